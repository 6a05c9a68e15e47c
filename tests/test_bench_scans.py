"""The benchmarks of the recurrences, small: what they run, write and say; floors, targets, and peers that are not here."""

import json
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx import bench, command
from lcx.benchmarks import scan_far, scan_numerics, scan_peers, scan_targets, scans, selective_scan, speed, ssd
from lcx.benchmarks.scan_cases import Scan, Ssd
from lcx.ops import selective_scan_chunked, ssd_chunked
from lcx.planning import memory
from lcx.registry import UserError
from tests.tolerance import assert_close

TINY = {"selective_scan": Scan(1, 24, 8, 2, dtype="float32"), "ssd": Ssd(1, 24, 2, 4, 64, dtype="float32")}
MODULES = {"selective_scan": selective_scan, "ssd": ssd}


@pytest.fixture
def small(monkeypatch):
    """Sizes for a CPU; and no change to this process's platform."""
    monkeypatch.setattr(command, "prepare_platform", lambda: None)
    monkeypatch.setattr(speed, "ROUNDS", 2)
    monkeypatch.setattr(speed, "BUDGET", 0.1)
    for op, module in MODULES.items():
        monkeypatch.setattr(module, "checked", lambda S, op=op: [TINY[op]])
        monkeypatch.setattr(module, "timed", lambda S, B, on_cpu, op=op: [TINY[op]])


@pytest.mark.parametrize("op", MODULES)
def test_it_runs_and_writes(op, small, tmp_path, capsys):
    assert command.status(bench.run, [op, "--lengths", "24", "--out", str(tmp_path)]) == 0
    printed, found = capsys.readouterr().out, json.loads((tmp_path / f"{op}_cpu.json").read_text())
    assert (tmp_path / f"{op}_cpu.png").stat().st_size > 0
    assert "no accelerator: small sizes" in printed and "not measured: mamba_ssm: No module named" in printed

    assert set(found) == {"conditions", "numerics", "timings", "targets"}
    assert {"mosaic_tpu", "attention cudnn", "mamba_ssm"} <= set(found["conditions"]["left_out"])
    assert [(row["implementation"], row["status"]) for row in found["numerics"]] == [("chunked", "ok"), ("chunked", "refused")]
    assert found["numerics"][1]["reason"] == "not tried: cpu does not say how much memory it has"
    peer = {"selective_scan": "associative_scan", "ssd": "mamba1 chunked"}[op]
    rows = [(row["direction"], row["implementation"]) for row in found["timings"]]
    assert rows == [(way, name) for way in scans.DIRECTIONS for name in ("chunked", peer, "attention chunked")]
    for row in found["timings"]:
        assert row["low"] <= row["milliseconds"] <= row["high"] and row["floor"] is None  # nothing is published of this CPU
    assert found["targets"] and all(target["met"] is None for target in found["targets"])


def test_wrong_numbers_are_said_and_end_in_status_1(small, tmp_path, capsys, monkeypatch):
    forward = selective_scan_chunked.forward

    def wrong(*args, **options):
        y, *more = forward(*args, **options)
        return y * 1.05, *more

    monkeypatch.setattr(selective_scan_chunked, "forward", wrong)
    monkeypatch.setattr(selective_scan, "timed", lambda S, B, on_cpu: [])
    monkeypatch.setattr(scans.results, "plot_times", lambda rows, path: None)
    assert command.status(bench.run, ["selective_scan", "--out", str(tmp_path)]) == 1
    assert "numbers of an implementation are wrong" in capsys.readouterr().out
    row, _ = json.loads((tmp_path / "selective_scan_cpu.json").read_text())["numerics"]
    assert row["status"] == "wrong" and row["reason"].startswith("y over")


FAR = {"selective_scan": Scan(1, 39, 8, 2, dtype="float32"), "ssd": Ssd(1, 39, 2, 4, 64, dtype="float32")}
CHUNKED = {"selective_scan": selective_scan_chunked, "ssd": ssd_chunked}


@pytest.mark.parametrize("op", FAR)
def test_a_row_equals_its_pieces(op, monkeypatch):
    """The twins: in one call the last tokens' outputs are lost, or their gradients."""
    case, module = FAR[op], CHUNKED[op]
    assert scan_far.compare(case, "chunked")["reason"] == "not tried: cpu does not say how much memory it has"
    monkeypatch.setattr(scan_far, "memory_stats", lambda device: dict(bytes_limit=2**30))
    row = scan_far.compare(case, "chunked")
    assert row["status"] == "ok" and {"y", "final", f"d{case.state[0]}"} < set(row["errors"]), row

    def lost(x):
        return x.at[:, 35:].set(0) if x.ndim > 2 and x.shape[1] == case.S else x

    for name, which in (("forward", "y"), ("backward", "d")):
        call = getattr(module, name)
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda *args, call=call, **options: jax.tree.map(lost, call(*args, **options)))
            row = scan_far.compare(case, "chunked")
            assert row["status"] == "wrong" and row["reason"].startswith(which), row


def test_what_does_not_fit_is_not_tried(monkeypatch):
    for module in (scan_far, memory):
        monkeypatch.setattr(module, "memory_stats", lambda device: dict(bytes_limit=2**10))
    row = scan_far.compare(FAR["ssd"], "chunked")
    assert row["status"] == "refused" and row["errors"] == {}
    assert re.fullmatch(r"not tried: it needs .* GiB on each cpu and it has 0.0", row["reason"])


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_far_is_far_and_its_pieces_are_not(module):
    numbers = module.FAR.S * module.FAR.E
    assert numbers > 2**31 > numbers / scan_far.PIECES and module.FAR.S % scan_far.PIECES == 0


def test_the_associative_scan_computes_the_same():
    case = TINY["selective_scan"]
    inputs = case.inputs()
    expected = scan_numerics.values(case, "reference", inputs)["y"]
    assert_close(jax.jit(scan_peers.associative_scan)(inputs), expected)


def test_steps_are_those_of_a_new_model():
    steps = jax.nn.softplus(Scan(1, 1, 4096, 1).inputs()["dt_bias_E"])
    assert steps.min() > 0.99e-3 and steps.max() < 0.101 and 0.009 < jnp.median(steps) < 0.011


def test_packed_rows_have_documents_and_padding():
    segments = Scan(2, 40, 8, 2, packed=True).segments_BS()
    assert segments.shape == (2, 40) and set(np.unique(segments)) == {0, 1, 2, 3} and (np.diff(segments[0, :35]) >= 0).all()


# What a device could do.


def test_floors_of_a_million_tokens():
    """On an H200, N=16: exponentials decide. On a v5p their rate is not published."""
    floors = Scan(1, 2**20, 2048, 16).floors("forward", "NVIDIA H200")
    assert math.isclose(floors["exponentials"], 2**20 * 2048 * 16 / (16 * 132 * 1.98e9))
    assert math.isclose(floors["memory"], 2**20 * 2 * (4 * 2048 + 2 * 16) / 4.8e12)
    assert max(floors, key=floors.get) == "exponentials"
    assert set(Scan(1, 1, 128, 1).floors("backward", "TPU v5p")) == {"memory"}
    assert Scan(1, 1, 128, 1).floors("backward", "cpu") == {}


def test_floors_of_ssd_grow_with_the_state():
    of = lambda N, way: Ssd(1, 2**20, 32, 64, N).floors(way, "NVIDIA H200")
    assert of(64, "forward")["memory"] > of(64, "forward")["products"]
    assert 1.4 < of(128, "forward")["products"] / of(64, "forward")["products"] < 2
    assert of(64, "backward")["products"] > 2 * of(64, "forward")["products"]


# Targets.


def rows_of(**by_implementation):
    """Rows from name -> {(direction, tokens): milliseconds}."""
    return [
        dict(implementation=name, direction=direction, S=S, milliseconds=took, N=64)
        for name, times in by_implementation.items()
        for (direction, S), took in times.items()
    ]


def test_targets_of_the_selective_scan():
    rows = rows_of(
        chunked={("forward", 2**15): 1.0, ("backward", 2**15): 3.5, ("forward", 2**20): 11.0, ("backward", 2**20): 30.0},
        associative_scan={("forward", 2**15): 25.0},
    )
    found = {target["what"]: (target["found"], target["met"]) for target in selective_scan.judge(rows)}
    assert found == {
        "ms forward at 1,048,576 tokens": (11.0, True),
        "backward over forward, at worst": (3.5, False),
        "times associative_scan at 32,768 tokens": (25.0, True),
    }


def test_ssd_is_judged_by_the_fastest_scan():
    times = {"chunked": 1.0, "mamba1 a": 3.0, "mamba1 b": 1.5}
    rows = rows_of(**{name: {("forward", 8): took} for name, took in times.items()})
    assert [(target["found"], target["met"]) for target in ssd.judge(rows)] == [(1.5, False)]


def test_the_crossover_is_where_it_stays_faster():
    forward = lambda *took: {("forward", 2**n): ms for n, ms in enumerate(took, start=10)}
    attention = {"attention a": forward(4, 2, 4, 8), "attention b": forward(1, 1, 1, 1)}
    rows = rows_of(chunked=forward(3, 3, 3, 3), **attention)
    first, second = scan_targets.crossovers(rows, "chunked")
    assert first["found"] == "from 4,096 tokens on" and second["found"].startswith("at none of")


# Peers.


def test_what_is_too_long_for_a_peer_is_a_row_with_the_reason():
    case = Scan(1, 2**16, 8, 2)
    (row,) = scans.measure(case, "forward", {"associative_scan": scan_peers.associative}, amortise=False)
    assert row["milliseconds"] is None and row["note"] == "not tried beyond 32,768 tokens"


@pytest.mark.parametrize("case", TINY.values(), ids=TINY)
def test_the_official_kernels_are_called_as_they_want_it(case, monkeypatch):
    """By stand-ins, of which every array is its shape: (B, E, S) for Mamba-1, (B, S, H, K) for Mamba-2."""
    calls = []
    torch = types.SimpleNamespace(
        randn=lambda *shape, **_: np.zeros(*shape),
        ones=lambda shape, **_: np.ones(shape),
        float32=None,
        no_grad=lambda: lambda solve: solve,
        randn_like=np.zeros_like,
        autograd=types.SimpleNamespace(grad=lambda y, arrays, dy, retain_graph: [np.zeros_like(x) for x in arrays]),
        cuda=types.SimpleNamespace(synchronize=lambda: calls.append("wait")),
    )

    def kernel(x, dt, A, B, C, *D, **options):
        calls.append((x.shape, dt.shape, A.shape, B.shape, C.shape))
        assert (A < 0).all()
        return np.zeros_like(x)

    modules = {"torch": torch, "mamba_ssm": None}
    for name in ("selective_scan_interface", "triton.ssd_combined"):
        modules[f"mamba_ssm.ops.{name}"] = types.SimpleNamespace(selective_scan_fn=kernel, mamba_chunk_scan_combined=kernel)
    monkeypatch.setattr(scan_peers.importlib, "import_module", modules.__getitem__)
    for direction in scans.DIRECTIONS:
        run = scan_peers.official(case, direction, {})
        jax.block_until_ready(run())
    wanted = {
        Scan: ((1, 8, 24), (1, 8, 24), (8, 2), (1, 2, 24), (1, 2, 24)),
        Ssd: ((1, 24, 2, 4), (1, 24, 2), (2,), (1, 24, 1, 64), (1, 24, 1, 64)),
    }[type(case)]
    assert calls == [wanted, "wait", wanted, "wait"]


def test_without_the_official_kernels_the_reason_is_said():
    with pytest.raises(UserError, match="mamba_ssm: No module named 'mamba_ssm'"):
        scan_peers.official(TINY["ssd"], "forward", {})
