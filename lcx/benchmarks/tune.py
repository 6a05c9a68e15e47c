"""Tile sizes of the attention kernels: tries each candidate on this device and keeps the fastest that takes every feature."""

import functools
import itertools
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
from lcx.ops.types import AttentionSpec, Mask, Runs, Segments, contiguous
from lcx.registry import UserError
from pallas_kernels import tiles
from pallas_kernels.specs import ATTENTION, Heads

TOKENS = 16_384
ROUNDS, BUDGET = 9, 5.0
# The implementation whose tiles are tuned, by the first word of a kernel's name.
IMPLEMENTATIONS = {"tpu": "mosaic_tpu", "hopper": "mosaic_gpu"}
# Of forward(...) -> o, lse and backward(...) -> dq, dk, dv, what keeps only this kernel; XLA leaves the others out.
PARTS = {"forward": slice(0, 2), "backward": slice(0, 3), "dq": slice(0, 1), "dkv": slice(1, 3)}
# Rows of one document; and everything at once, which takes the most registers and memory.
VARIANTS = ("causal", "everything")
DOCUMENTS, WINDOW, SINKS, SOFTCAP = 8, 4096, 4, 30.0


def problems(kernel: str) -> list[tuple[Heads, str, tuple[str, ...]]]:
    """(heads, dtype, parts) on which a kernel of `tiles.HEURISTICS` is measured: the models that have its head width."""
    _, *words = kernel.split("_")
    if len(words) == 1:  # by dtype, and for both kernels
        return [(heads, words[0], ("forward", "backward")) for heads in ATTENTION.values()]
    return [(heads, "bfloat16", (words[0],)) for heads in ATTENTION.values() if heads.K == int(words[1])]


def described(variant: str, B: int, S: int, K: int) -> dict[str, Any]:
    """The keywords of a backend for one of `VARIANTS`; "everything" is packed rows in zigzag order."""
    if variant == "causal":
        order, segments = contiguous(S), Segments(None, None)
        return dict(spec=AttentionSpec(Mask(), K**-0.5), order_q=order, order_k=order, segments=segments)
    spec = AttentionSpec(Mask(window=(WINDOW, 0), sink_tokens=SINKS), K**-0.5, SOFTCAP)
    order = Runs(jnp.asarray([0, 3 * (S // 2)], jnp.int32), S // 2)
    length = -(-S // DOCUMENTS)
    ids_BS, place_BS = (jnp.broadcast_to(x, (B, S)) for x in (1 + jnp.arange(S) // length, jnp.arange(S) % length))
    return dict(spec=spec, order_q=order, order_k=order, segments=Segments(ids_BS, ids_BS, place_BS < SINKS))


def program(
    implementation: str, part: str, variant: str, inputs: dict[str, jax.Array], sizes: dict[str, tuple[int, int]]
) -> Callable[[], Any]:
    """Runs one part of attention, whose kernels have these tile sizes."""
    q, k, v, do = inputs.values()
    B, S, H, K = q.shape
    options = described(variant, B, S, K)
    segments = dict(zip(("segments_q_BS", "segments_k_BT", "sink_BT"), options["segments"], strict=True))
    backend = attention_backend(implementation, options["spec"], q, k, v, **segments)
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
    """A row for each candidate, the heuristic first: its time in all, the heuristic's being 1, or why there is none."""
    family = kernel.partition("_")[0]
    heuristic = tiles.HEURISTICS[kernel]
    totals = {sizes: 0.0 for sizes in dict.fromkeys((heuristic, *tiles.CANDIDATES[family]))}
    notes: dict[tuple[int, int], str] = {}
    for heads, dtype, parts in problems(kernel):
        inputs = Case("causal", 1, TOKENS, *heads, dtype=dtype).inputs()
        for part, variant in itertools.product(parts, VARIANTS):
            names = {f"{sizes}": sizes for sizes in totals if sizes not in notes}
            make = functools.partial(program, IMPLEMENTATIONS[family], part, variant, inputs)
            run = {name: make({kernel: sizes}) for name, sizes in names.items()}
            found = interleaved(run, rounds=ROUNDS, budget=BUDGET, amortise=jax.devices()[0].platform != "cpu")
            for name, took in found.items():
                if isinstance(took, Timing):
                    totals[names[name]] += took.median
                else:
                    notes[names[name]] = f"{variant}: {took}"
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
