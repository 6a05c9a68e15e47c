"""Tile sizes of the attention kernels: tries each candidate on this device and keeps the fastest."""

import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lcx import command
from lcx.benchmarks import results
from lcx.benchmarks.cases import Case
from lcx.benchmarks.timing import Timing, interleaved
from lcx.ops import dispatch
from lcx.ops.attention import attention_backend
from lcx.ops.types import AttentionSpec, Mask, Segments, contiguous
from lcx.registry import UserError
from pallas_kernels import tiles
from pallas_kernels.specs import ATTENTION, Heads

TOKENS = 16_384
ROUNDS, BUDGET = 9, 5.0
# The implementation whose tiles are tuned, by the first word of a kernel's name.
IMPLEMENTATIONS = {"tpu": "mosaic_tpu", "hopper": "mosaic_gpu"}
# Of forward(...) -> o, lse and backward(...) -> dq, dk, dv, what keeps only this kernel; XLA leaves the others out.
PARTS = {"forward": slice(0, 2), "dq": slice(0, 1), "dkv": slice(1, 3)}


def problems(kernel: str) -> list[tuple[Heads, str, tuple[str, ...]]]:
    """(heads, dtype, parts) on which a kernel of `tiles.HEURISTICS` is measured: the models that have its head width."""
    _, *words = kernel.split("_")
    if len(words) == 1:  # by dtype, and for all three parts
        return [(heads, words[0], tuple(PARTS)) for heads in ATTENTION.values()]
    return [(heads, "bfloat16", (words[0],)) for heads in ATTENTION.values() if heads.K == int(words[1])]


def program(implementation: str, part: str, inputs: dict[str, jax.Array], sizes: dict[str, tuple[int, int]]) -> Callable[[], Any]:
    """Runs one part of causal attention, whose kernels have these tile sizes."""
    q, k, v, do = inputs.values()
    B, S, H, K = q.shape
    spec, order = AttentionSpec(Mask(), K**-0.5), contiguous(S)
    backend = attention_backend(implementation, spec, q, k, v)
    options = dict(spec=spec, order_q=order, order_k=order, segments=Segments(None, None))
    # Any logsumexp takes as long; this one is near what normal numbers give.
    lse = jnp.full((B, H, S), math.log(S), jnp.float32)
    rows = () if part == "forward" else (do, lse, jnp.zeros_like(lse))
    function = backend.backward if rows else backend.forward
    compiled = jax.jit(lambda *arrays: function(*arrays, **options)[PARTS[part]])

    def run():
        with tiles.trying(sizes):  # the first call traces
            return compiled(q, k, v, *rows)

    return run


def measure(kernel: str) -> list[dict[str, Any]]:
    """A row for each candidate, the heuristic first: its time, the heuristic's being 1, or why there is none."""
    family = kernel.partition("_")[0]
    heuristic = tiles.HEURISTICS[kernel]
    totals = {sizes: 0.0 for sizes in dict.fromkeys((heuristic, *tiles.CANDIDATES[family]))}
    notes: dict[tuple[int, int], str] = {}
    for heads, dtype, parts in problems(kernel):
        inputs = Case("causal", 1, TOKENS, *heads, dtype=dtype).inputs()
        for part in parts:
            names = {f"{sizes}": sizes for sizes in totals if sizes not in notes}
            run = {name: program(IMPLEMENTATIONS[family], part, inputs, {kernel: sizes}) for name, sizes in names.items()}
            found = interleaved(run, rounds=ROUNDS, budget=BUDGET, amortise=jax.devices()[0].platform != "cpu")
            for name, took in found.items():
                if isinstance(took, Timing):
                    totals[names[name]] += took.median
                else:
                    notes[names[name]] = took
    base = totals[heuristic]
    row = lambda sizes: dict(kernel=kernel, own=sizes[0], across=sizes[1], note=notes.get(sizes, ""))
    ratio = lambda sizes: None if sizes in notes or heuristic in notes else totals[sizes] / base
    return [row(sizes) | dict(time=ratio(sizes)) for sizes in totals]


def run(argv: list[str]) -> int:
    """Measures every kernel of this device, prints, and writes the fastest sizes."""
    parser = command.Parser(prog="python -m lcx.bench tune", description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=pathlib.Path, default=tiles.TUNED, metavar="DIR", help=f"default: {tiles.TUNED}")
    args = parser.parse_args(argv)
    platform, device_kind = dispatch.target()
    family = {"tpu": "tpu", "gpu": "hopper"}.get(platform)
    if family is None:
        raise UserError(f"tune: no kernel with tiles to choose runs on {device_kind} (valid: TPU, Hopper GPU)")
    kernels = [kernel for kernel in tiles.HEURISTICS if kernel.startswith(f"{family}_")]
    rows, best = [], {}
    for kernel in kernels:
        mine = measure(kernel)
        rows += mine
        print(results.markdown(("kernel", "own", "across", "time", "note"), mine) + "\n", flush=True)
        known = [row for row in mine if row["time"] is not None]
        if known:
            fastest = min(known, key=lambda row: row["time"])
            best[kernel] = (fastest["own"], fastest["across"])
    if not best:
        raise UserError(f"tune: none of {', '.join(kernels)} runs on {device_kind}: {rows[0]['note']}")
    path = results.write(dict(conditions=results.conditions(tokens=TOKENS), tiles=best, measured=rows), args.out)
    print(f"wrote {path}")
    return 0
