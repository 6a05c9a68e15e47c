"""Timing several programs in one process, in turns, so that a clock that drifts or a chip that heats up slows all of them."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

SHORTEST = 0.02  # seconds; on an accelerator a shorter call is repeated until it takes as long, so that launching it is hidden
CALLS = 100  # at most, in one measurement


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call.

    Attributes:
      median: over the rounds.
      low, high: of the fastest round and the slowest.
      rounds: how many there were.
      calls: made in each, one after another.
    """

    median: float
    low: float
    high: float
    rounds: int
    calls: int


def interleaved(
    thunks: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    budget: float,
    amortise: bool,
    clock: Callable[[], float] = time.perf_counter,
    wait: Callable[[Any], Any] = jax.block_until_ready,
) -> dict[str, Timing | str]:
    """Times every thunk: two calls to warm up, then rounds in which each has its turn, in the order given and backwards in turns.

    Args:
      thunks: by name; each starts its work and returns arrays.
      rounds: at most.
      budget: seconds for the rounds of one thunk; a slow one is in fewer of them, at least in one.
      amortise: repeat short calls within a round; for devices that execute calls one after another.
      clock, wait: for tests.

    Returns:
      by name a Timing, or why there is none: it does not compile, it needs more memory than there is, ...
    """
    found: dict[str, Timing | str] = {}
    calls: dict[str, int] = {}
    turns: dict[str, int] = {}
    taken: dict[str, list[float]] = {name: [] for name in thunks}

    def measure(name: str, count: int) -> float | None:
        # Whatever one program fails of is its result, and the others go on.
        try:
            began = clock()
            for _ in range(count):
                out = thunks[name]()
            wait(out)
            return (clock() - began) / count
        except Exception as error:
            found[name] = reason(error)
            return None

    for name in thunks:
        if measure(name, 1) is None or (once := measure(name, 1)) is None:
            continue
        calls[name] = min(CALLS, math.ceil(SHORTEST / max(once, 1e-9))) if amortise else 1
        turns[name] = max(1, min(rounds, int(budget / max(once * calls[name], 1e-9))))
    for turn in range(rounds):
        for name in thunks if turn % 2 == 0 else reversed(thunks):
            if name not in found and turn < turns[name] and (seconds := measure(name, calls[name])) is not None:
                taken[name].append(seconds)
    for name, seconds in taken.items():
        if name not in found:
            found[name] = Timing(statistics.median(seconds), min(seconds), max(seconds), len(seconds), calls[name])
    return {name: found[name] for name in thunks}


def reason(error: Exception) -> str:
    """An error as one short line."""
    line = (str(error).strip().splitlines() or [""])[0]
    return (line if isinstance(error, ValueError) else f"{type(error).__name__}: {line}")[:200]
