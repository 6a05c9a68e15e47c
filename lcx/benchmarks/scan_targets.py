"""Measured rows of a recurrence against targets. Rows are `scans.measure`'s, of those that have a time."""

from typing import Any

from pallas_kernels import KERNELS

Rows = list[dict[str, Any]]
OURS = {*KERNELS["selective_scan"], *KERNELS["ssd"]}


def implementations(rows: Rows) -> list[str]:
    """Ours, not peers."""
    return [name for name in dict.fromkeys(row["implementation"] for row in rows) if name in OURS]


def times(rows: Rows, direction: str) -> dict[tuple[str, int], float]:
    """(implementation, tokens) -> milliseconds."""
    return {(row["implementation"], row["S"]): row["milliseconds"] for row in rows if row["direction"] == direction}


def at_most(name: str, what: str, found: float, target: float) -> dict[str, Any]:
    """A figure that is to be small."""
    return dict(implementation=name, what=what, found=round(found, 3), target=f"at most {target:g}", met=found <= target)


def at_least(name: str, what: str, found: float, target: float) -> dict[str, Any]:
    """A figure that is to be large."""
    return dict(implementation=name, what=what, found=round(found, 3), target=f"at least {target:g}", met=found >= target)


def backward_over_forward(rows: Rows, name: str, target: float, more: str = "") -> list[dict[str, Any]]:
    """At the length where it is largest."""
    forward, backward = times(rows, "forward"), times(rows, "backward")
    ratios = [backward[at] / forward[at] for at in forward if at[0] == name and at in backward]
    return [at_most(name, f"backward over forward, at worst{more}", max(ratios), target)] if ratios else []


def slowest_ratio(rows: Rows, name: str, peers: str, what: str, target: float) -> list[dict[str, Any]]:
    """Speed, forward, over that of the fastest peer whose name starts so; at the length where it is smallest."""
    forward, ratios = times(rows, "forward"), []
    for S in (S for who, S in forward if who == name):
        theirs = [took for (who, s), took in forward.items() if who.startswith(peers) and s == S]
        ratios += [min(theirs) / forward[name, S]] if theirs else []
    return [at_least(name, what, min(ratios), target)] if ratios else []


def crossovers(rows: Rows, name: str, more: str = "") -> list[dict[str, Any]]:
    """From which of the lengths on it is faster than each attention, forward."""
    found, forward = [], times(rows, "forward")
    for peer in dict.fromkeys(row["implementation"] for row in rows if row["implementation"].startswith("attention")):
        both = sorted(S for who, S in forward if who == name and (peer, S) in forward)
        faster = [S for i, S in enumerate(both) if all(forward[name, s] < forward[peer, s] for s in both[i:])]
        answer = f"from {faster[0]:,} tokens on" if faster else f"at none of {both} tokens"
        if both:
            found.append(dict(implementation=name, what=f"faster than {peer}{more}", found=answer, target=None, met=None))
    return found
