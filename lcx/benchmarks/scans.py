"""The benchmark of a recurrence: numerics against fp32, then speed beside peers and beside what the device could do."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

from lcx import command
from lcx.benchmarks import attention as attention_benchmark
from lcx.benchmarks import results, scan_far, scan_peers, speed
from lcx.benchmarks.scan_cases import Scan, Ssd
from lcx.benchmarks.scan_numerics import compare
from lcx.benchmarks.scan_targets import OURS
from lcx.benchmarks.timing import Timing, interleaved, reason
from lcx.registry import UserError, unknown
from pallas_kernels import KERNELS

Case = Scan | Ssd
DIRECTIONS = ("forward", "backward")
LENGTHS = (2**11, 2**12, 2**13, 2**14, 2**15, 2**20)
QUICK_LENGTHS = (2**12, 2**15)
CPU_LENGTHS = (256, 512)
# Tokens of a row whose numbers are compared: several programs along it where a kernel cuts rows; on a CPU, and not.
CHECKED, CPU_CHECKED = 5_000, 300
TARGET_DEVICE = "H200"
COLUMNS = ("case", "S", "direction", "implementation", "milliseconds", "floor", "of_floor", "note")


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What is particular to a recurrence.

    Attributes:
      op: a key of `pallas_kernels.KERNELS`.
      checked: tokens of a row -> cases whose numbers are compared with the reference's.
      far: a row of more than 2^31 numbers, which is compared with its pieces.
      timed: (tokens of a row, rows, whether for a CPU) -> cases of one length.
      peers: name -> peer (`lcx.benchmarks.scan_peers`), beside those that every recurrence has.
      judge: rows -> targets (`lcx.benchmarks.scan_targets`), which are for an H200.
    """

    op: str
    checked: Callable[[int], Sequence[Case]]
    far: Case
    timed: Callable[[int, int, bool], Sequence[Case]]
    peers: dict[str, Callable]
    judge: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]


def arguments(argv: list[str], op: str) -> Any:
    """The parsed options, checked.

    Raises:
      UserError: an option that is wrong.
    """
    table, on_cpu = KERNELS[op], jax.devices()[0].platform == "cpu"
    parser = command.Parser(prog=f"python -m lcx.bench {op}", description=__doc__, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="two lengths")
    parser.add_argument("--out", type=pathlib.Path, default=results.FOLDER, metavar="DIR", help=f"default: {results.FOLDER}")
    parser.add_argument("--implementations", metavar="A,B", help=f"of {', '.join(table)} (default: kernels for this device)")
    parser.add_argument("--lengths", type=int, nargs="+", metavar="S", help="tokens in a row")
    args = parser.parse_args(argv)
    if args.implementations is not None:
        args.implementations = tuple(args.implementations.split(","))
        for name in args.implementations:
            if name not in table:
                raise unknown("implementation", name, table)
    for length in args.lengths or ():
        if length < 1:
            raise UserError(f"--lengths={length} must be at least 1")
    args.chosen_lengths = tuple(args.lengths or (CPU_LENGTHS if on_cpu else QUICK_LENGTHS if args.quick else LENGTHS))
    return args


def kernels_here(op: str, case: Case) -> tuple[tuple[str, ...], dict[str, str]]:
    """(kernels that take a case on this device, or `chunked` where none does; the others, and why)."""
    left_out = {}
    for name in (kernels := [name for name in KERNELS[op] if name not in ("reference", "chunked")]):
        try:
            jax.eval_shape(lambda name=name: case.solver(name)(case.inputs()))
        except UserError as refused:
            left_out[name] = str(refused)
    return tuple(name for name in kernels if name not in left_out) or ("chunked",), left_out


def measure(case: Case, direction: str, programs: dict[str, Callable], *, amortise: bool) -> list[dict[str, Any]]:
    """One row for each program: milliseconds, the least it could take, the share of that, or why there is no time."""
    thunks, notes = {}, {}
    # What does not fit, or does not compile, is in the table with its reason.
    try:
        inputs = case.inputs()
        for name, make in programs.items():
            try:
                thunks[name] = make(case, direction, inputs)
            except Exception as error:
                notes[name] = reason(error)
    except Exception as error:
        notes = dict.fromkeys(programs, reason(error))
    found = interleaved(thunks, rounds=speed.ROUNDS, budget=speed.BUDGET, amortise=amortise)
    floors, rows = case.floors(direction, jax.devices()[0].device_kind), []
    for name in programs:
        took = found.get(name)
        row = dict(case=case.name, direction=direction, implementation=name, milliseconds=None, low=None, high=None, rounds=0)
        row |= dict(note=took if isinstance(took, str) else notes.get(name, ""), **dataclasses.asdict(case))
        row |= dict(floor=None, of_floor=None)
        if isinstance(took, Timing):
            row |= dict(milliseconds=1e3 * took.median, low=1e3 * took.low, high=1e3 * took.high, rounds=took.rounds)
            if floors and name in OURS:  # peers compute something else, or the same in another way
                row["floor"] = 1e3 * max(floors.values())
                row["of_floor"] = f"{row['floor'] / row['milliseconds']:.0%} ({max(floors, key=floors.get)})"
        rows.append(row)
    return rows


def run(argv: list[str], benchmark: Benchmark) -> int:
    """Measures, prints, writes and draws; 1 where numerics are wrong."""
    args, on_cpu = arguments(argv, benchmark.op), jax.devices()[0].platform == "cpu"
    checked, left_out = benchmark.checked(CPU_CHECKED if on_cpu else CHECKED), {}
    if args.implementations is None:
        args.implementations, left_out = kernels_here(benchmark.op, checked[0])
    programs = {name: scan_peers.ours(name) for name in args.implementations} | benchmark.peers
    for name in ("mosaic_tpu", "mosaic_gpu", "cudnn"):
        if (why := attention_benchmark.cannot_run(name)) is None:
            programs[f"attention {name}"] = scan_peers.attention(name)
        else:
            left_out[f"attention {name}"] = why
    if on_cpu:
        programs["attention chunked"] = scan_peers.attention("chunked")
    if (why := scan_peers.missing_official()) is None:
        programs["mamba_ssm"] = scan_peers.official
    else:
        left_out["mamba_ssm"] = why

    options = dict(implementations=args.implementations, left_out=left_out, lengths=args.chosen_lengths, quick=args.quick)
    conditions = results.conditions(**options)
    print(f"{conditions['device_kind']}, jax {conditions['jax']}")
    if on_cpu:
        print("no accelerator: small sizes, which show that the command works and say nothing of kernels")
    for why in left_out.values():
        print(f"not measured: {why}")
    print("\nnumerics against fp32", flush=True)
    numerics = compare(checked, args.implementations)
    numerics += [scan_far.compare(benchmark.far, name) for name in args.implementations if name != "reference"]
    for row in numerics:
        worst = max(row["errors"], key=row["errors"].get, default=None)
        said = row["reason"] or f"at most {row['errors'][worst]:.1e} ({worst})"
        print(f"{row['implementation']:<14}{row['case']:<48}{row['status']:<9}{said}")
    wrong = any(row["status"] in ("wrong", "failed") for row in numerics)

    print("\nspeed", flush=True)
    timings = []
    for S in args.chosen_lengths:
        for case in benchmark.timed(S, 1 if on_cpu else max(1, speed.TOKENS // S), on_cpu):
            for direction in DIRECTIONS:
                rows = measure(case, direction, programs, amortise=not on_cpu)
                timed = [row for row in rows if row["milliseconds"] is not None]
                took = ", ".join(f"{row['implementation']} {row['milliseconds']:.3f} ms" for row in timed) or "none"
                print(f"  {case.name}, {case.B} x {case.S:,} tokens, {direction}: {took}", flush=True)
                timings += rows
    print("\n" + results.markdown(COLUMNS, timings) + "\n")
    targets = benchmark.judge([row for row in timings if row["milliseconds"] is not None])
    for found in targets:
        if TARGET_DEVICE not in conditions["device_kind"]:
            found["met"] = None
        verdict = {None: "", True: ": met", False: ": missed"}[found["met"]]
        target = "" if found["target"] is None else f"; target on an {TARGET_DEVICE} {found['target']}"
        print(f"{found['implementation']}: {found['what']} {found['found']}{target}{verdict}")

    result = dict(conditions=conditions, numerics=numerics, timings=timings, targets=targets)
    path = results.write(result, args.out, f"{benchmark.op}_")
    print(f"\nwrote {path}")
    try:
        results.plot_times(timings, path.with_suffix(".png"))
        print(f"wrote {path.with_suffix('.png')}")
    except ModuleNotFoundError:
        print("no plot: it needs matplotlib, lcx[plots]")
    if wrong:
        print("error: the numbers of an implementation are wrong, or it fails: see the numerics above")
    return int(wrong)
