"""The TPU kernels of the selective scan: interpreted against the reference, what they refuse, compiled for every TPU, bundles."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.ops import selective_scan_chunked as chunked
from lcx.ops.recurrence import marks
from lcx.ops.selective_scan import Inputs, ScanSpec, selective_scan
from lcx.parallel import recurrences
from lcx.planning.kernel_counts import compile_into, tpu_scan
from lcx.planning.kernels import TPUS, compile_selective_scan
from lcx.registry import UserError
from pallas_kernels import interpret, selective_scan_tpu, selective_scan_tpu_cut, selective_scan_tpu_layout
from tests.recurrences import breaks, compare, compare_over_devices, compare_summaries, runner
from tests.test_selective_scan import OPTIONAL, problem
from tests.tolerance import assert_close

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="NOT CHECKED: compiling for TPUs needs pip install 'lcx[plan]' (libtpu)"
)


@pytest.fixture
def short_chunks(monkeypatch):
    """Chunks of 32 tokens, so that short rows have several; loops as they are written: compiling is all of these tests' time."""
    monkeypatch.setattr(selective_scan_tpu_cut, "CHUNKS", (32,))
    monkeypatch.setattr(selective_scan_tpu_layout, "UNROLLED", 1)


# Interpreted.


def test_it_equals_the_reference(short_chunks):
    """Two tiles of channels, the second of 128; two chunks, the last of 11 tokens; documents, padding, everything optional."""
    arrays, segments, cotangents = problem(1, 43, 1152, 2)
    expected = runner(selective_scan, implementation="reference")(arrays, segments, cotangents)
    run = runner(selective_scan, implementation="mosaic_tpu")
    with interpret.interpreted():
        compare(run(arrays, segments, cotangents), expected)
        breaks(run, arrays, segments, cotangents, expected)


def test_it_equals_the_reference_in_bf16_on_two_cores(short_chunks, monkeypatch):
    """Nothing optional, dt as it is, three rows of whole chunks of whole tiles, which two cores share."""
    monkeypatch.setattr(selective_scan_tpu_cut, "device_kind", lambda: "TPU v5p")
    arrays, _, cotangents = problem(3, 64, 2048, 2, without=OPTIONAL)
    arrays["dt_BSE"] = np.exp(arrays["dt_BSE"])
    narrow = {name: x.astype(jnp.bfloat16) if name[-3:] in ("BSE", "BSN") else x for name, x in arrays.items()}
    widened = {name: np.asarray(x, np.float32) for name, x in narrow.items()}
    expected = runner(selective_scan, implementation="reference", dt_softplus=False)(widened, None, cotangents)
    run = runner(selective_scan, implementation="mosaic_tpu", dt_softplus=False)
    with interpret.interpreted():
        actual = run(narrow, None, cotangents)
        for name, x in actual.items():
            assert x.dtype == (jnp.bfloat16 if name == "y" or name[-3:] in ("BSE", "BSN") else jnp.float32), name
        compare(actual, expected, dtype="bfloat16")
        assert_close(actual["final"], expected["final"])  # states are fp32 throughout
        with pytest.raises(AssertionError):
            compare(run(narrow | dict(dt_BSE=narrow["dt_BSE"] * 1.125), None, cotangents), expected, dtype="bfloat16")


def test_the_summaries_of_a_stretch(short_chunks):
    """Against those of the chunked implementation: rows with documents that start inside, and one without."""
    arrays, segments, (dy, _) = problem(2, 75, 128, 2, without=("initial_state_BEN",))
    segments[1] = 1
    inputs, spec = Inputs(**{name: jnp.asarray(x) for name, x in arrays.items()}, marks=marks(jnp.asarray(segments))), ScanSpec()
    compare_summaries(selective_scan_tpu, chunked, inputs, spec, dy, inputs._replace(A_EN=inputs.A_EN * 1.001))


@pytest.mark.slow
@pytest.mark.parametrize("states", [1, 17])
def test_it_equals_the_reference_with_other_numbers_of_states(states, short_chunks):
    arrays, segments, cotangents = problem(1, 75, 128, states)
    expected = runner(selective_scan, implementation="reference")(arrays, segments, cotangents)
    with interpret.interpreted():
        compare(runner(selective_scan, implementation="mosaic_tpu")(arrays, segments, cotangents), expected)


@pytest.mark.slow
def test_it_equals_the_reference_in_loops_as_on_a_device():
    """Chunks of 128 tokens, several parts of every loop in a basic block."""
    arrays, segments, cotangents = problem(1, 150, 128, 2)
    expected = runner(selective_scan, implementation="reference")(arrays, segments, cotangents)
    with interpret.interpreted():
        compare(runner(selective_scan, implementation="mosaic_tpu")(arrays, segments, cotangents), expected)


@pytest.mark.slow
def test_over_devices_it_equals_the_whole(short_chunks, mesh_of):
    """Summaries, states passed between devices, and gradients, with every mesh axis manual."""
    arrays, segments, (dy, _) = problem(1, 80, 128, 2, without=("initial_state_BEN",))
    compare_over_devices(recurrences.selective_scan, arrays, segments, dy, mesh_of(), mesh_of(seq=4), "mosaic_tpu")


# Where it runs.


def call(E=128, N=2, dtype=jnp.float32, **changed):
    shape = lambda *dims, dtype=dtype: jax.ShapeDtypeStruct(dims, dtype)
    arrays = dict(u_BSE=shape(1, 8, E), dt_BSE=shape(1, 8, E), A_EN=shape(E, N, dtype=jnp.float32))
    arrays |= dict(B_BSN=shape(1, 8, N), C_BSN=shape(1, 8, N), D_E=shape(E)) | changed
    return jax.eval_shape(functools.partial(selective_scan, implementation="mosaic_tpu"), **arrays)


def test_it_says_why_it_does_not_run_here():
    with pytest.raises(UserError, match="'mosaic_tpu' cannot run on cpu: mosaic_tpu: it is for TPU v4, TPU v5, TPU v6"):
        call()


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (dict(E=200), "E=200 channels; it takes multiples of 128, the nearest is 256"),
        (dict(E=72), "E=72 channels; it takes multiples of 128, the nearest is 128"),
        (dict(N=48), "N=48 states a channel; it takes at most 32"),
        (dict(dtype=jnp.float16), "u_BSE has dtype float16; it takes bfloat16 and float32"),
    ],
)
def test_what_it_refuses(changed, reason):
    with interpret.interpreted(), pytest.raises(UserError, match=reason):
        call(**changed)


def test_what_does_not_fit_a_chip_is_refused():
    shapes, dtypes = dict(A_EN=(8192, 16)), dict.fromkeys(("u_BSE", "dt_BSE"), jnp.dtype("bfloat16"))
    ask = functools.partial(selective_scan_tpu.refuse, ScanSpec(), dtypes=dtypes)
    assert ask(shapes, device_kind="TPU v5p") is None
    reason = ask(shapes, device_kind="TPU v4")
    fits = int(reason.rpartition("N=")[2])
    assert ask(dict(A_EN=(8192, fits)), device_kind="TPU v4") is None
    assert "take more memory than TPU v4 has" in ask(dict(A_EN=(8192, fits + 1)), device_kind="TPU v4")


def test_a_mesh_that_is_left_to_the_compiler_is_refused(mesh_of):
    x = dict(
        zip(("u_BSE", "dt_BSE", "A_EN", "B_BSN", "C_BSN", "D_E"), map(jnp.zeros, ((1, 8, 128),) * 2 + ((128, 2),)), strict=False)
    )
    x |= dict(B_BSN=jnp.zeros((1, 8, 2)), C_BSN=jnp.zeros((1, 8, 2)), D_E=jnp.zeros(128))
    with (
        interpret.interpreted(),
        jax.set_mesh(mesh_of(data=2)),
        pytest.raises(UserError, match="mesh axes data, fsdp, seq, tensor"),
    ):
        selective_scan(**x, implementation="mosaic_tpu")


# Ahead of time.


@needs_libtpu
@pytest.mark.parametrize("target", TPUS)
def test_compiles_for_every_tpu(target, monkeypatch):
    """A last tile and a last chunk that are not full; for v5p 2^22 tokens, 2^32 elements, loops unrolled."""
    if target != "v5p":
        monkeypatch.setattr(selective_scan_tpu_layout, "UNROLLED", 1)  # a third of the time
    tokens, channels = (2**22, 1024) if target == "v5p" else (300, 1152)
    assert "lcx_selective_scan_backward" in compile_selective_scan(target, tokens, channels, 2).as_text()


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("target", TPUS)
@pytest.mark.parametrize(("dtype", "states", "channels"), [("bfloat16", 16, 4096), ("float32", 16, 2048), ("float32", 32, 128)])
def test_compiles_at_other_sizes(target, dtype, states, channels):
    shapes, dtypes = dict(A_EN=(channels, states)), dict.fromkeys(("u_BSE", "dt_BSE"), jnp.dtype(dtype))
    reason = selective_scan_tpu.refuse(ScanSpec(), shapes, dtypes, {"v4": "TPU v4"}.get(target, "TPU v5p"))
    if reason is None:
        compile_selective_scan(target, 1000, channels, states, dtype)
    else:
        assert target == "v4" and states == 32 and "take more memory" in reason


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("target", TPUS)
def test_the_summaries_compile(target):
    text = compile_selective_scan(target, 2**20, 1024, 16, passes=False, summaries=True).as_text()
    assert "lcx_selective_scan_summary" in text and "lcx_selective_scan_reverse_summary" in text


@needs_libtpu
@pytest.mark.slow
def test_memory_at_four_million_tokens():
    """States of the boundaries, and otherwise nothing in proportion to tokens times channels: both passes, N=16."""
    memory = compile_selective_scan("v5p", 2**22, 1024, 16).memory_analysis()
    boundaries = 4 * 16 / 128 * 2**22 * 1024
    assert boundaries <= memory.temp_size_in_bytes <= 2 * boundaries


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("target", ["v5e", "v5p", "v6e"])
def test_bundles(target, tmp_path):
    """At most 40 for a token of 1,024 channels forward, and three times what the forward pass takes backward."""
    compile_into(tmp_path, "selective_scan", target)
    found = tpu_scan(tmp_path)
    assert found["forward"] <= 40
    assert found["backward"] <= 3 * found["forward"]
