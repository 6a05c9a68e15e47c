"""The selective scan (Mamba-1) on the device that is here. Targets are for an H200."""

from typing import Any

from lcx.benchmarks import scan_far, scan_peers, scan_targets, scans
from lcx.benchmarks.scan_cases import Scan

E, N = 2048, 16
CPU_E = 128
FAR = Scan(1, scan_far.TOKENS, E, N)
# Milliseconds of a million tokens forward; times associative_scan at 32,768 tokens; backward over forward.
MILLISECONDS, OVER_ASSOCIATIVE, BACKWARD = 12.0, 20.0, 3.0


def checked(S: int) -> list[Scan]:
    """Whole rows and packed ones, in both dtypes."""
    return [Scan(2, S, 256, N, packed, dtype) for packed in (False, True) for dtype in ("bfloat16", "float32")]


def timed(S: int, B: int, on_cpu: bool) -> list[Scan]:
    """One case a length."""
    return [Scan(B, S, CPU_E if on_cpu else E, N)]


def judge(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every target for every implementation, and from which length on it is faster than attention."""
    found, forward = [], scan_targets.times(rows, "forward")
    for name in scan_targets.implementations(rows):
        if (took := forward.get((name, 2**20))) is not None:
            found.append(scan_targets.at_most(name, "ms forward at 1,048,576 tokens", took, MILLISECONDS))
        found += scan_targets.backward_over_forward(rows, name, BACKWARD)
        if {(name, 2**15), ("associative_scan", 2**15)} <= set(forward):
            ratio = forward["associative_scan", 2**15] / forward[name, 2**15]
            found.append(scan_targets.at_least(name, "times associative_scan at 32,768 tokens", ratio, OVER_ASSOCIATIVE))
        found += scan_targets.crossovers(rows, name)
    return found


def run(argv: list[str]) -> int:
    """See `scans.run`."""
    peers = {"associative_scan": scan_peers.associative}
    return scans.run(argv, scans.Benchmark("selective_scan", checked, FAR, timed, peers, judge))
