"""Attention kernels beside a ruler: numerics against fp32, then speed forward and backward, then what a ring costs."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from lcx import command
from lcx.benchmarks import results, ring_tax
from lcx.benchmarks.cases import Case, solver
from lcx.benchmarks.numerics import checked_cases, compare, described
from lcx.benchmarks.speed import measure, timed_cases
from lcx.ops import dispatch
from lcx.registry import UserError, unknown
from pallas_kernels import KERNELS
from pallas_kernels.specs import ATTENTION

TABLE = KERNELS["attention"]
RULERS = {"gpu": "cudnn", "tpu": "tokamax"}  # elsewhere chunked
# The speed over the ruler's that a kernel is to reach, on an H200 at these lengths.
TARGETS = {"forward": 0.95, "backward": 0.90}
TARGET_LENGTHS = (8_192, 131_072)

LENGTHS = tuple(2**n for n in range(12, 18))  # 4,096 to 131,072
QUICK_LENGTHS = (4_096, 16_384)
MULTIPLE = 32  # that a length has to be of: documents in a packed row, chunks of the longest ring
LONGEST = 2**20


def judge(rows: list[dict[str, Any]], ruler: str) -> list[dict[str, Any]]:
    """The slowest ratio of each implementation in each direction at the lengths of the targets."""
    first, last = TARGET_LENGTHS
    found = []
    for direction, target in TARGETS.items():
        for name in dict.fromkeys(row["implementation"] for row in rows if row["implementation"] != ruler):
            mine = [row for row in rows if (row["implementation"], row["direction"]) == (name, direction)]
            ratios = [row["ratio"] for row in mine if first <= row["S"] <= last and row["ratio"] is not None]
            if ratios:
                worst = min(ratios)
                found.append(dict(implementation=name, direction=direction, target=target, worst=worst, met=worst >= target))
    return found


def arguments(argv: list[str]) -> Any:
    """The parsed options, checked.

    Raises:
      UserError: an option that is wrong.
    """
    parser = command.Parser(prog="python -m lcx.bench attention", description=__doc__, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="two lengths, the two main problems, a short ring")
    parser.add_argument("--out", type=pathlib.Path, default=results.FOLDER, metavar="DIR", help=f"default: {results.FOLDER}")
    parser.add_argument("--implementations", metavar="A,B", help=f"of {', '.join(TABLE)} (default: kernels for this device)")
    parser.add_argument("--ruler", help="the implementation that ratios are taken against (default: by platform)")
    parser.add_argument("--lengths", type=int, nargs="+", metavar="S", help=f"tokens, multiples of {MULTIPLE}")
    args = parser.parse_args(argv)
    args.ruler = args.ruler or RULERS.get(dispatch.target()[0], "chunked")
    args.left_out = {}
    if args.implementations is None:
        kernels = [name for name in TABLE if name not in ("reference", "chunked", args.ruler)]
        args.left_out = {name: why for name in kernels if (why := cannot_run(name)) is not None}
        args.implementations = tuple(name for name in kernels if name not in args.left_out) or ("chunked",)
    else:
        args.implementations = tuple(args.implementations.split(","))
    for name in (*args.implementations, args.ruler):
        if name not in TABLE:
            raise unknown("implementation", name, TABLE)
    if (why := cannot_run(args.ruler)) is not None:
        raise UserError(f"--ruler={args.ruler}: {why}; --ruler=chunked measures without another's kernel")
    for length in args.lengths or ():
        if length < 1 or length % MULTIPLE:
            raise UserError(f"--lengths={length} must be a multiple of {MULTIPLE}, at least that")
    args.chosen_lengths = tuple(args.lengths or (QUICK_LENGTHS if args.quick else LENGTHS))
    return args


def cannot_run(implementation: str) -> str | None:
    """Why it takes not even a plain causal call here; None if it does."""
    H, G, K = ATTENTION["llama3_8b"]
    array = lambda heads: jax.ShapeDtypeStruct((1, 4_096, heads, K), jnp.bfloat16)
    try:
        solve, _ = solver(Case("causal", 1, 4_096, H, G, K), implementation)
        jax.eval_shape(solve, array(H), array(G), array(G))
    except UserError as refused:
        return str(refused)
    return None


def run(argv: list[str]) -> int:
    """Measures, prints, writes and draws; 1 where numerics are wrong."""
    args = arguments(argv)
    amortise = jax.devices()[0].platform != "cpu"
    everyone = tuple(dict.fromkeys((args.ruler, *args.implementations)))
    measured = dict(implementations=args.implementations, ruler=args.ruler, left_out=args.left_out)
    conditions = results.conditions(**measured, lengths=args.chosen_lengths, quick=args.quick)
    print(f"{conditions['device_kind']}, jax {conditions['jax']}, ruler {args.ruler}")
    for why in args.left_out.values():
        print(f"not measured: {why}")
    print("\nnumerics against fp32", flush=True)
    numerics = compare(checked_cases(), everyone)
    print("\n".join(described(row) for row in numerics))
    # What the ruler cannot do is in the table, and no failure of what is measured.
    wrong = any(row["status"] in ("wrong", "failed") for row in numerics if row["implementation"] in args.implementations)

    print("\nspeed", flush=True)
    timings = []
    work = [(case, way) for case in timed_cases(args.chosen_lengths, args.quick) for way in TARGETS]
    if not args.quick and args.lengths is None:
        work.append((Case("causal llama3_70b_tp8", 1, LONGEST, *ATTENTION["llama3_70b_tp8"]), "forward"))
    for case, direction in work:
        rows = measure(case, direction, args.implementations, args.ruler, amortise=amortise)
        took = (f"{row['implementation']} {row['milliseconds']:.3f} ms" for row in rows if row["milliseconds"] is not None)
        print(f"  {case.name}, {case.S:,} tokens, {direction}: {', '.join(took) or 'none'}", flush=True)
        timings += rows
    columns = ("case", "S", "direction", "implementation", "milliseconds", "tflops", "ratio", "note")
    print("\n" + results.markdown(columns, timings))
    targets = judge(timings, args.ruler)
    for found in targets:
        verdict = "met" if found["met"] else "missed"
        print(
            f"{found['implementation']} {found['direction']}: at worst {found['worst']:.3f} of {args.ruler}; "
            f"target {found['target']}: {verdict}"
        )

    row_tokens = max(args.chosen_lengths)
    heads = ATTENTION["llama3_8b"]
    taxes = ring_tax.measure(row_tokens, args.implementations, heads=heads, quick=args.quick, amortise=amortise)
    print("\nthe steps of a ring on one device, against one kernel of the same area\n")
    print(results.markdown(ring_tax.COLUMNS, taxes))

    result = dict(conditions=conditions, numerics=numerics, timings=timings, targets=targets, ring_tax=taxes)
    path = results.write(result, args.out, "attention_")
    print(f"\nwrote {path}")
    try:
        results.plot_ratios(timings, args.ruler, TARGETS, path.with_suffix(".png"))
        print(f"wrote {path.with_suffix('.png')}")
    except ModuleNotFoundError:
        print("no plot: it needs matplotlib, lcx[plots]")
    if wrong:
        print("error: the numbers of an implementation are wrong, or it fails: see the numerics above")
    return int(wrong)
