"""The benchmark commands, small: what they count, how they time, what they write and say."""

import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx import bench, command
from lcx.benchmarks import BENCHMARKS, cases, numerics, results, ring_tax, speed, timing, tune
from lcx.benchmarks import attention as attention_benchmark
from lcx.benchmarks.cases import Case, visible_pairs
from lcx.ops import attention_chunked, dispatch
from lcx.ops.types import Mask
from lcx.registry import load
from pallas_kernels import attention_hopper, attention_tpu, support, tiles
from pallas_kernels.specs import ATTENTION, Heads
from tests import attention_oracle

TINY = Heads(2, 1, 8)


# Areas.


@pytest.mark.parametrize("documents", [(13,), (1,), (5, 1, 7), (9, 4)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, (3, 2), (0, 0), (None, 1), (4, None), (90, 90)])
@pytest.mark.parametrize("sink_tokens", [0, 2])
def test_visible_pairs_are_counted_exactly(documents, causal, window, sink_tokens):
    mask, length = Mask(causal=causal, window=window, sink_tokens=sink_tokens), sum(documents) + 2
    ids = np.pad(np.repeat(np.arange(1, len(documents) + 1), documents), (0, 2))[None]
    order = np.arange(length)
    assert visible_pairs(mask, documents) == attention_oracle.visible_BST(mask, order, order, ids, ids).sum()


def test_areas_and_flops_are_exact_at_a_million_tokens():
    case = Case("", 1, 2**20, 8, 1, 128)
    assert case.pairs() == 2**20 * (2**20 + 1) // 2
    assert case.flops("forward") == 4 * 128 * 8 * case.pairs()
    assert case.flops("backward") == 10 * 128 * 8 * case.pairs()  # 2.5 times as many
    packed = Case("", 3, 64, 2, 1, 8, documents=(16, 16))
    assert packed.pairs() == 3 * 2 * 16 * 17 // 2


# Documents as rows, for a ruler that takes none.


def test_documents_of_one_length_are_rows_of_a_batch(monkeypatch):
    takes_none = lambda spec, shapes, dtypes, kind: "no documents" if "segments_q_BS" in shapes else None
    monkeypatch.setattr(attention_chunked, "refuse", takes_none)
    case = Case("packed", 2, 24, *TINY, documents=(8, 8, 8), dtype="float32")
    inputs = case.inputs()
    expected = numerics.results(case, "reference", inputs)
    for name, found in numerics.results(case, "chunked", inputs).items():
        assert numerics.rms_ratio(found, expected[name]) < 1e-5
    assert cases.solver(case, "chunked")[1] == "documents as rows of a batch"
    uneven = Case("packed", 2, 24, *TINY, documents=(8, 9))
    assert uneven.as_rows() is None
    (row,) = numerics.compare((uneven,), ("chunked",))
    assert row["status"] == "refused" and "no documents" in row["reason"]


# Timing, with a clock that a call moves on.


class World:
    """Thunks that take a known time each, and their order."""

    def __init__(self, **seconds):
        self.now, self.calls = 0.0, []
        self.thunks = {name: lambda name=name, took=took: self.call(name, took) for name, took in seconds.items()}

    def call(self, name, took):
        self.calls.append(name)
        self.now += next(took) if isinstance(took, itertools.cycle) else took
        return name

    def time(self, **options):
        options = dict(rounds=4, budget=1e9, amortise=False) | options
        return timing.interleaved(self.thunks, **options, clock=lambda: self.now, wait=lambda out: out)


def test_thunks_take_turns_in_alternating_order():
    world = World(a=1.0, b=2.0)
    found = world.time()
    assert "".join(world.calls) == "aabb" + "ab" + "ba" + "ab" + "ba"
    assert found == dict(a=timing.Timing(1.0, 1.0, 1.0, 4, 1), b=timing.Timing(2.0, 2.0, 2.0, 4, 1))


def test_the_median_of_the_rounds_is_taken_and_the_spread_kept():
    found = World(a=itertools.cycle([9.0, 9.0, 1.0, 2.0, 30.0])).time(rounds=3)["a"]
    assert (found.median, found.low, found.high) == (2.0, 1.0, 30.0)


def test_short_calls_are_repeated_and_slow_ones_are_in_fewer_rounds():
    world = World(short=timing.SHORTEST / 4, slow=10.0)
    found = world.time(amortise=True, budget=25.0)
    assert found["short"].calls == 4 and math.isclose(found["short"].median, timing.SHORTEST / 4)
    assert (found["slow"].rounds, found["slow"].calls) == (2, 1)


def test_one_that_fails_is_reported_and_the_others_go_on():
    world = World(a=1.0)

    def fails():
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nand much more")

    world.thunks = dict(broken=fails) | world.thunks
    found = world.time()
    assert found["broken"] == "RuntimeError: RESOURCE_EXHAUSTED: Out of memory"
    assert found["a"].rounds == 4


# The steps of a ring.


def test_the_steps_of_a_rank_have_the_area_of_one_kernel():
    """Of queries that are 0 every key weighs the same: the logsumexp counts the keys that are seen."""
    rank = ring_tax.Rank("chunked", 64, 4, TINY)
    rank.rows = jnp.zeros_like(rank.rows[0]), rank.rows[1]
    run = ring_tax.thunks("forward", rank)
    (_, one), (_, steps) = run["one"](), run["steps"]()
    seen = ring_tax.local_runs(ring_tax.LAYOUT, 64, 4, 0).order() + 1
    for lse in (one, steps):
        np.testing.assert_allclose(np.exp(lse), np.broadcast_to(seen, lse.shape), rtol=1e-5)


# The command.


@pytest.fixture
def small(monkeypatch):
    """Sizes for a CPU; and no change to this process's platform."""
    monkeypatch.setattr(command, "prepare_platform", lambda: None)
    for module in (attention_benchmark, speed):
        monkeypatch.setattr(module, "ATTENTION", dict.fromkeys(ATTENTION, TINY))
    one = Case("packed, padding", 1, 24, *TINY, documents=(9, 5))
    monkeypatch.setattr(attention_benchmark, "checked_cases", lambda: (one,))
    for name, value in dict(TOKENS=32, ROUNDS=2, BUDGET=0.1).items():
        monkeypatch.setattr(speed, name, value)
    monkeypatch.setattr(ring_tax, "ROUNDS", 2)
    monkeypatch.setattr(ring_tax, "BUDGET", 0.1)


def test_the_benchmark_runs_and_writes(small, tmp_path, capsys):
    options = ["--quick", "--lengths", "32", "--implementations", "reference,cudnn", "--out", str(tmp_path / "here")]
    assert command.status(bench.run, ["attention", *options]) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "here" / "attention_cpu.json").read_text())
    assert (tmp_path / "here" / "attention_cpu.png").stat().st_size > 0

    assert set(found) == {"conditions", "numerics", "timings", "targets", "ring_tax"}
    assert {"device_kind", "jax", "runtime", "date", "ruler", "lengths", "left_out"} <= set(found["conditions"])
    assert found["conditions"]["ruler"] == "chunked"
    statuses = [(row["implementation"], row["status"]) for row in found["numerics"]]
    assert statuses == [("chunked", "ok"), ("reference", "ok"), ("cudnn", "refused")]

    rows = found["timings"]
    assert {(row["S"], row["direction"], row["implementation"]) for row in rows} == set(
        itertools.product((32,), ("forward", "backward"), ("chunked", "reference", "cudnn"))
    )
    for row in rows:
        if row["implementation"] == "cudnn":  # never left out
            assert row["milliseconds"] is None and "it is for NVIDIA GPUs since Ampere and this is cpu" in row["note"]
            continue
        flops = {"forward": 4, "backward": 10}[row["direction"]] * row["pairs"] * row["K"] * row["H"]
        assert math.isclose(row["tflops"], flops / (1e-3 * row["milliseconds"]) / 1e12, rel_tol=1e-9)
        assert row["low"] <= row["milliseconds"] <= row["high"]
    ruled = {(row["case"], row["S"], row["direction"]): row for row in rows if row["implementation"] == "chunked"}
    for row in (row for row in rows if row["implementation"] == "reference"):
        ruler = ruled[row["case"], row["S"], row["direction"]]
        assert math.isclose(row["ratio"], ruler["milliseconds"] / row["milliseconds"])

    taxes = {(row["implementation"], row["direction"]): row for row in found["ring_tax"]}
    assert taxes["reference", "backward"]["ratio"] > 0 and taxes["reference", "forward"]["P"] == 4
    assert "cudnn: it is for NVIDIA GPUs" in taxes["cudnn", "forward"]["note"]
    assert "| causal llama3_8b | 32 | backward | reference |" in printed


def test_wrong_numbers_are_said_and_end_in_status_1(small, tmp_path, capsys, monkeypatch):
    forward = attention_chunked.forward

    def wrong(*args, **options):
        o, lse = forward(*args, **options)
        return o * 1.05, lse

    monkeypatch.setattr(attention_chunked, "forward", wrong)
    monkeypatch.setattr(attention_benchmark, "timed_cases", lambda lengths, quick: [])
    monkeypatch.setattr(ring_tax, "measure", lambda *args, **options: [])
    assert command.status(bench.run, ["attention", "--quick", "--out", str(tmp_path)]) == 1
    assert "numbers of an implementation are wrong" in capsys.readouterr().out
    numbers = json.loads((tmp_path / "attention_cpu.json").read_text())["numerics"]
    assert [row["status"] for row in numbers] == ["wrong"] and numbers[0]["reason"].startswith("o")


@pytest.mark.parametrize(
    "arguments,message",
    [
        ([], "benchmark='' is not known (valid: attention, selective_scan, ssd, tune)"),
        (["atention"], "did you mean 'attention'"),
        (["attention", "--ruler", "cudnm"], "did you mean 'cudnn'"),
        (["attention", "--implementations", "chunked,x"], "implementation='x' is not known"),
        (["attention", "--lengths", "100"], "--lengths=100 must be a multiple of 32"),
        (["attention", "--quik"], "unrecognized arguments: --quik"),
        (["tune"], "no kernel with tiles to choose runs on cpu"),
        (["ssd", "--implementations", "chunkd"], "did you mean 'chunked'"),
        (["selective_scan", "--lengths", "0"], "--lengths=0 must be at least 1"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(small, capsys, arguments, message):
    assert command.status(bench.run, arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and said.count("\n") == 1


def test_every_benchmark_of_the_table_runs():
    assert all(callable(load(BENCHMARKS, name, field="benchmark").run) for name in BENCHMARKS)


def test_the_timed_cases_have_what_is_promised():
    made = speed.timed_cases(attention_benchmark.LENGTHS, quick=False)
    assert {case.K for case in made} == {64, 128} and {case.S for case in made} == {2**n for n in range(12, 18)}
    assert any(case.H == case.G for case in made) and any(case.H > case.G for case in made)
    assert all(case.as_rows() is not None for case in made if case.documents)  # so that the ruler can
    assert all(case.S % attention_benchmark.MULTIPLE == 0 for case in made)


def test_targets_are_judged_by_the_slowest():
    row = lambda S, ratio: dict(implementation="mine", direction="forward", S=S, ratio=ratio)
    found = attention_benchmark.judge([row(4_096, 0.1), row(8_192, 0.97), row(16_384, 0.94), row(65_536, None)], "cudnn")
    assert found == [dict(implementation="mine", direction="forward", target=0.95, worst=0.94, met=False)]


def test_without_a_device_for_kernels_the_default_says_what_is_left_out(small):
    args = attention_benchmark.arguments([])
    assert args.implementations == ("chunked",) and set(args.left_out) == {"mosaic_tpu", "mosaic_gpu", "cudnn", "tokamax"}
    assert "this is cpu" in args.left_out["mosaic_gpu"]


# Tile sizes.


def test_measured_sizes_go_before_the_heuristic(monkeypatch, tmp_path):
    assert attention_tpu.tile_sizes(jnp.bfloat16) == (512, 512)
    assert attention_hopper.sizes("dq", 128) == (2, 64)
    (tmp_path / "nvidia_h200.json").write_text(json.dumps(dict(tiles={"hopper_dq_128": [64, 128]})))
    monkeypatch.setattr(tiles, "TUNED", tmp_path)
    assert attention_hopper.sizes("dq", 128) == (2, 64)  # this is not one
    monkeypatch.setattr(tiles, "device_kind", lambda: "NVIDIA H200")
    assert attention_hopper.sizes("dq", 128) == (1, 128)
    assert attention_hopper.sizes("dq", 64) == (2, 128)
    with tiles.trying({"hopper_dq_128": (128, 128)}):
        assert attention_hopper.sizes("dq", 128) == (2, 128)


def test_shipped_sizes_are_of_kernels_that_exist():
    for path in tiles.TUNED.glob("*.json"):
        found = json.loads(path.read_text())
        assert set(found["tiles"]) <= set(tiles.HEURISTICS) and tiles.slug(found["conditions"]["device_kind"]) == path.stem


def test_tuning_traces_each_candidate_and_writes_the_fastest(small, monkeypatch, tmp_path):
    """On a stand-in for a kernel: it asks for its tiles as one does, and the clock says that large ones are fast."""
    heuristics = {"hopper_forward_8": (64, 64), "hopper_dkv_8": (64, 64)}
    monkeypatch.setattr(tiles, "HEURISTICS", heuristics)
    monkeypatch.setattr(tiles, "CANDIDATES", dict(hopper=((64, 64), (128, 64), (256, 64), (128, 999))))
    monkeypatch.setattr(tune, "ATTENTION", dict(tiny=TINY))
    monkeypatch.setattr(tune, "IMPLEMENTATIONS", dict(hopper="chunked"))
    monkeypatch.setattr(tune, "TOKENS", 16)
    monkeypatch.setattr(dispatch, "target", lambda: ("gpu", "cpu"))
    traced = []

    def asking(kernel, function):
        def run(*args, **options):
            sizes = tiles.tile_sizes(kernel)
            traced.append((kernel, sizes))
            if sizes[1] == 999 or (sizes[0] == 256 and options["spec"].softcap):
                raise RuntimeError("does not fit")
            return function(*args, **options)

        return run

    monkeypatch.setattr(attention_chunked, "forward", asking("hopper_forward_8", attention_chunked.forward))
    monkeypatch.setattr(attention_chunked, "backward", asking("hopper_dkv_8", attention_chunked.backward))

    def measured(thunks, **_):
        found = {}
        for name, thunk in thunks.items():
            try:
                assert len(thunk()) == 2  # o and lse, dk and dv
                found[name] = timing.Timing(1 / sum(traced[-1][1]), 0, 0, 1, 1)
            except RuntimeError as error:
                found[name] = timing.reason(error)
        return found

    monkeypatch.setattr(tune, "interleaved", measured)
    assert command.status(bench.run, ["tune", "--out", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "cpu.json").read_text())
    assert written["tiles"] == {"hopper_forward_8": [128, 64], "hopper_dkv_8": [128, 64]}
    notes = [f"{variant}: RuntimeError: does not fit" for variant in ("everything", "causal")]
    assert [row["note"] for row in written["measured"]] == ["", "", *notes] * 2
    assert written["conditions"]["device_kind"] == jax.devices()[0].device_kind
    tried = [(64, 64), (128, 64), (256, 64)]
    assert [sizes for _, sizes in traced] == [*tried, (128, 999), *tried] * 2


# What the README shows.


def test_the_readme_shows_the_table_of_support():
    assert support.table() in (tiles.TUNED.parent / "README.md").read_text()
    assert support.refusal("cudnn", "packed documents, padding") and support.refusal("mosaic_gpu", "causal") is None


def test_tables_and_cells():
    assert (
        results.markdown(("a", "b"), [dict(a=1234, b=0.5), dict(a="x")]) == "| a | b |\n|---|---|\n| 1,234 | 0.500 |\n| x | - |"
    )
