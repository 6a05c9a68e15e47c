"""How fast attention is, forward and backward: every implementation of one case in turns, beside a ruler."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from lcx.benchmarks.cases import Case, pullback, solver
from lcx.benchmarks.timing import Timing, interleaved, reason
from lcx.ops.types import Mask
from pallas_kernels.specs import ATTENTION

TOKENS = 16_384  # in all rows, where a row is shorter
DOCUMENTS = 8  # in a packed row
ROUNDS, BUDGET = 15, 10.0  # rounds, and seconds of them, for each implementation


def timed_cases(lengths: tuple[int, ...], quick: bool) -> list[Case]:
    """Grouped queries, as many keys as queries, heads of 64 and 128, packed, windowed and full rows."""
    cases = []
    for S in lengths:
        make = lambda name, heads, S=S, **more: Case(name, max(1, TOKENS // S), S, *ATTENTION[heads], **more)
        cases.append(make("causal llama3_8b", "llama3_8b"))
        cases.append(make("packed llama3_8b", "llama3_8b", documents=(S // DOCUMENTS,) * DOCUMENTS))
        if not quick:
            cases.append(make("causal llama2_7b", "llama2_7b"))
            cases.append(make("causal llama3_1b", "llama3_1b"))
            cases.append(make("window llama3_8b", "llama3_8b", mask=Mask(window=(S // 4 - 1, 0))))
            cases.append(make("full llama3_8b", "llama3_8b", mask=Mask(causal=False)))
    return cases


def thunks(case: Case, direction: str, names: tuple[str, ...]) -> tuple[dict[str, Callable], dict[str, str]]:
    """(what each implementation runs, by name; remarks and refusals, by name)."""
    inputs, run, remarks = case.inputs(), {}, {}
    for name in names:
        # What does not fit, or does not compile, is in the table with its reason.
        try:
            solve, remarks[name] = solver(case, name)
            if direction == "forward":
                run[name] = functools.partial(jax.jit(solve), inputs["q"], inputs["k"], inputs["v"])
            else:
                run[name] = functools.partial(pullback(solve, inputs["q"], inputs["k"], inputs["v"]), inputs["do"])
        except Exception as error:
            remarks[name] = reason(error)
    return run, remarks


def measure(case: Case, direction: str, names: tuple[str, ...], ruler: str, *, amortise: bool) -> list[dict[str, Any]]:
    """One row for each implementation: milliseconds, TFLOP/s on the mask's area, speed over the ruler's, or why not."""
    names = tuple(dict.fromkeys((ruler, *names)))
    try:
        run, remarks = thunks(case, direction, names)
    except Exception as error:  # the arrays themselves do not fit
        run, remarks = {}, dict.fromkeys(names, reason(error))
    found = interleaved(run, rounds=ROUNDS, budget=BUDGET, amortise=amortise)
    base, rows = found.get(ruler), []
    for name in names:
        took = found.get(name)
        row = dict(case=case.name, direction=direction, implementation=name, milliseconds=None, low=None, high=None)
        row |= dict(tflops=None, ratio=None, rounds=0, note=took if isinstance(took, str) else remarks[name])
        row |= dict(B=case.B, S=case.S, H=case.H, G=case.G, K=case.K, dtype=case.dtype, pairs=case.pairs())
        if isinstance(took, Timing):
            row |= dict(milliseconds=1e3 * took.median, low=1e3 * took.low, high=1e3 * took.high, rounds=took.rounds)
            row["tflops"] = case.flops(direction) / took.median / 1e12
            row["ratio"] = base.median / took.median if isinstance(base, Timing) else None
        rows.append(row)
    return rows
