"""The TPU kernels of state-space duality: interpreted against the reference, refusals, compiled for every TPU, bundles."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.ops import ssd_chunked as chunked
from lcx.ops.recurrence import marks
from lcx.ops.ssd import Inputs, SsdSpec, ssd
from lcx.parallel import recurrences
from lcx.planning.bundles import vmem_bytes
from lcx.planning.kernel_counts import compile_into, tpu_ssd
from lcx.planning.kernels import TPUS, compile_ssd
from lcx.registry import UserError
from pallas_kernels import interpret, ssd_tpu, ssd_tpu_chunk, ssd_tpu_cut
from tests.recurrences import breaks, compare, compare_over_devices, compare_summaries, ignores_padding, runner
from tests.test_ssd import BY_TOKEN, OPTIONAL, problem
from tests.tolerance import assert_close, rms_ratio

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="NOT CHECKED: compiling for TPUs needs pip install 'lcx[plan]' (libtpu)"
)
# Bundles for a token and head, K=64, N=128, bf16, four tiles of heads a core, packed documents: (forward, backward).
# Measured with libtpu 0.0.48.1; a budget is 3 % more.
MEASURED = {"v5p": (1.32, 3.18), "v5e": (1.24, 3.07), "v6e": (1.02, 2.50)}
MARGIN = 1.03
# Bytes of a kernel; measured: at most 5.0 MiB forward and 10.8 MiB backward.
VMEM = 12 * 2**20


@pytest.fixture
def short_chunks(monkeypatch):
    """Blocks of two chunks of 32 tokens, so that short rows have several; compiling is most of these tests' time."""
    monkeypatch.setattr(ssd_tpu_cut, "CHUNK", 32)
    monkeypatch.setattr(ssd_tpu_cut, "CHUNKS", (2, 1))


# Interpreted.


def test_it_equals_the_reference(short_chunks):
    """Two groups of three heads, so that a tile has one of zeros; the last chunk of 11 tokens; documents, padding, limits."""
    arrays, segments, cotangents = problem(2, 75, 6, 64, 2, 64)
    limits = dict(dt_limit=(0.1, 1.0))
    expected = runner(ssd, implementation="reference", **limits)(arrays, segments, cotangents)
    run = runner(ssd, implementation="mosaic_tpu", **limits)
    with interpret.interpreted():
        actual = run(arrays, segments, cotangents)
        compare(actual, expected)
        breaks(run, arrays, segments, cotangents, expected)
        for name, again in run(arrays, segments, cotangents).items():
            np.testing.assert_array_equal(actual[name], again, err_msg=name)


def test_it_equals_the_reference_in_bf16_on_two_cores(short_chunks, monkeypatch):
    """Nothing optional, dt as it is, whole blocks; heads of width 128, which two cores share."""
    monkeypatch.setattr(ssd_tpu_cut, "device_kind", lambda: "TPU v5p")
    arrays, _, cotangents = problem(1, 64, 2, 128, 1, 128, without=OPTIONAL)
    arrays["dt_BSH"] = np.exp(arrays["dt_BSH"])
    narrow = {name: x.astype(jnp.bfloat16) if name in BY_TOKEN else x for name, x in arrays.items()}
    widened = {name: np.asarray(x, np.float32) for name, x in narrow.items()}
    expected = runner(ssd, implementation="reference", dt_softplus=False)(widened, None, cotangents)
    run = runner(ssd, implementation="mosaic_tpu", dt_softplus=False)
    assert ssd_tpu_cut.Cut(Inputs(**narrow)).parts == 2
    with interpret.interpreted():
        actual = run(narrow, None, cotangents)
        for name, x in actual.items():
            assert x.dtype == (jnp.bfloat16 if name == "y" or name[1:] in BY_TOKEN else jnp.float32), name
        compare(actual, expected, dtype="bfloat16")
        assert_close(actual["final"], expected["final"])  # states are fp32 throughout
        with pytest.raises(AssertionError):
            compare(run(narrow | dict(dt_BSH=narrow["dt_BSH"] * 1.125), None, cotangents), expected, dtype="bfloat16")


def test_the_summaries_of_a_stretch(short_chunks):
    """Against those of the chunked implementation: rows with documents that start inside, and one without."""
    arrays, segments, (dy, _) = problem(2, 75, 2, 64, 1, 64, without=("initial_state_BHKN",))
    segments[1] = 1
    inputs, spec = Inputs(**{name: jnp.asarray(x) for name, x in arrays.items()}, marks=marks(jnp.asarray(segments))), SsdSpec()
    compare_summaries(ssd_tpu, chunked, inputs, spec, dy, inputs._replace(A_H=inputs.A_H * 1.001))


CASES = {
    "K=128, N=256": ((1, 150, 2, 128, 1, 256), True, {}),
    "K=64, N=192": ((1, 260, 2, 64, 1, 192), True, {}),
    "strong and weak decay": ((1, 384, 2, 64, 1, 64), False, dict(A_H=np.array([-16.0, -0.01], np.float32))),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_it_equals_the_reference_at_other_sizes(name):
    """Chunks and blocks as on a device."""
    shape, packed, changed = CASES[name]
    arrays, segments, cotangents = problem(*shape)
    arrays, segments = arrays | changed, segments if packed else None
    expected = runner(ssd, implementation="reference")(arrays, segments, cotangents)
    with interpret.interpreted():
        run = runner(ssd, implementation="mosaic_tpu")
        compare(run(arrays, segments, cotangents), expected)
        with pytest.raises(AssertionError):
            compare(run(arrays | dict(A_H=arrays["A_H"] * 1.001), segments, cotangents), expected)


def dA_of_one_head(x_SK, dt_S, A, B_SN, C_SN, state_KN, dy_SK, dfinal_KN):
    """The gradient of a rate, token by token in fp64; dt as it is."""
    states, decays = [state_KN], np.exp(dt_S * A)
    for x_K, dt, B_N, decay in zip(x_SK, dt_S, B_SN, decays, strict=True):
        states.append(decay * states[-1] + dt * np.outer(x_K, B_N))
    total, g_KN = 0.0, dfinal_KN
    for t in reversed(range(len(dt_S))):
        g_KN = g_KN + np.outer(dy_SK[t], C_SN[t])
        total += dt_S[t] * decays[t] * (g_KN * states[t]).sum()
        g_KN = decays[t] * g_KN
    return total


def test_the_gradient_of_slow_rates_over_a_long_row(short_chunks):
    """It is a sum over all tokens of which much cancels, so that it shows ten times what all steps err by: 2.7e-6 and more with
    steps from a logarithm next to 1, as XLA on a CPU computes it."""
    arrays, _, (dy, dfinal) = problem(1, 512, 2, 64, 1, 64, without=("dt_bias_H",))
    arrays |= dict(dt_BSH=0.1 * arrays["dt_BSH"] - 4, A_H=np.array([-0.5, -0.01], np.float32))
    x, dt, A, B, C, _, state = (x.astype(np.float64) for x in arrays.values())
    steps, of_group = np.logaddexp(0, dt), (B[0, :, 0], C[0, :, 0])
    of_head = lambda h: (x[0, :, h], steps[0, :, h], A[h], *of_group, state[0, h], dy[0, :, h], dfinal[0, h])
    expected = [dA_of_one_head(*of_head(h)) for h in range(2)]
    run = runner(ssd, implementation="mosaic_tpu")
    with interpret.interpreted():
        assert rms_ratio(run(arrays, None, (dy, dfinal))["dA_H"], expected) < 2e-6
        changed = arrays | dict(dt_BSH=arrays["dt_BSH"] * np.float32(1.00001))
        assert rms_ratio(run(changed, None, (dy, dfinal))["dA_H"], expected) > 1e-5


@pytest.mark.slow
def test_over_devices_it_equals_the_whole(short_chunks, mesh_of):
    """Summaries, states passed between devices, and gradients, with every mesh axis manual."""
    arrays, segments, (dy, _) = problem(1, 80, 2, 64, 1, 64, without=("initial_state_BHKN",))
    compare_over_devices(recurrences.ssd, arrays, segments, dy, mesh_of(), mesh_of(seq=4), "mosaic_tpu")


def test_padding_may_hold_anything(short_chunks):
    ignores_padding(runner(ssd, implementation="mosaic_tpu"), *problem(1, 75, 2, 64, 1, 64), BY_TOKEN)


# How a call is divided.


@pytest.mark.parametrize(
    ("tiles", "kind", "parts"),
    [(16, "TPU v5p", 2), (16, "TPU v6e", 2), (40, "TPU v5p", 10), (5, "TPU v6e", 5), (1, "TPU v5p", 1)],
)
def test_parts_of_a_group(tiles, kind, parts):
    """Both cores of a v5p have work where that is possible; tiles go by fours where that is possible."""
    assert ssd_tpu_cut.divide(tiles, 1, 128, 2, kind) == (parts, 4)


def test_every_size_fits_every_tpu():
    for kind in ("TPU v4", "TPU v5 lite", "TPU v5p", "TPU v6 lite"):
        for N in ssd_tpu.STATE_SIZES:
            for itemsize in (2, 4):
                assert ssd_tpu_cut.divide(16, 1, N, itemsize, kind)[1] >= (4 if kind != "TPU v4" else 1)


# Where it runs.


def call(H=2, K=64, N=64, dtype=jnp.float32, **options):
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, dtype)
    arrays = dict(x_BSHK=shape(1, 8, H, K), dt_BSH=shape(1, 8, H), A_H=jax.ShapeDtypeStruct((H,), jnp.float32))
    arrays |= dict(B_BSGN=shape(1, 8, 1, N), C_BSGN=shape(1, 8, 1, N), D_H=jax.ShapeDtypeStruct((H,), jnp.float32))
    return jax.eval_shape(functools.partial(ssd, implementation="mosaic_tpu", **options), **arrays)


def test_it_says_why_it_does_not_run_here():
    with pytest.raises(UserError, match="'mosaic_tpu' cannot run on cpu: mosaic_tpu: it is for TPU v4, TPU v5, TPU v6"):
        call()


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (dict(K=96), "head width K=96; it takes 64, 128"),
        (dict(N=16), "state size N=16; it takes 64, 128, 192, 256"),
        (dict(chunk=64), "chunk=64; it takes 128, or None"),
        (dict(dtype=jnp.float16), "x_BSHK has dtype float16; it takes bfloat16 and float32"),
    ],
)
def test_what_it_refuses(changed, reason):
    with interpret.interpreted(), pytest.raises(UserError, match=reason):
        call(**changed)


def test_a_mesh_that_is_left_to_the_compiler_is_refused(mesh_of):
    with (
        interpret.interpreted(),
        jax.set_mesh(mesh_of(data=2)),
        pytest.raises(UserError, match="mesh axes data, fsdp, seq, tensor"),
    ):
        call()


# Ahead of time.


@needs_libtpu
@pytest.mark.parametrize("target", TPUS)
def test_compiles_for_every_tpu(target, monkeypatch):
    """For v5p eight million tokens, arrays of 2^32 elements; for the others a last block that is not full."""
    monkeypatch.setattr(ssd_tpu_chunk, "TOGETHER", 1)  # less code, which is what compiling takes time for
    size = (2**23, 8, 64, 1, 64) if target == "v5p" else (300, 2, 64, 1, 64)
    assert "lcx_ssd_backward" in compile_ssd(target, *size).as_text()


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("target", TPUS)
@pytest.mark.parametrize(
    ("size", "dtype"),
    [((1000, 16, 64, 1, 128), "bfloat16"), ((1000, 6, 64, 2, 192), "bfloat16"), ((1000, 4, 128, 2, 256), "float32")],
)
def test_compiles_at_other_sizes(target, size, dtype):
    compile_ssd(target, *size, dtype)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("target", TPUS)
def test_the_summaries_compile(target):
    text = compile_ssd(target, 2**20, 16, 64, 1, 128, passes=False, summaries=True).as_text()
    assert "lcx_ssd_summary" in text and "lcx_ssd_reverse_summary" in text


@needs_libtpu
@pytest.mark.slow
def test_memory_at_four_million_tokens():
    """States of the blocks and what the parts of a group add to dB and dC in fp32; otherwise nothing in proportion to tokens."""
    S, H, K, N = 2**22, 16, 64, 128
    memory = compile_ssd("v5p", S, H, K, 1, N).memory_analysis()
    states, maps = 4 * H * K * N * S // 512, 2 * 2 * 4 * N * S
    assert states + maps <= memory.temp_size_in_bytes <= 1.25 * (states + maps)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("target", MEASURED)
def test_bundles_and_vector_memory(target, tmp_path, capsys):
    compile_into(tmp_path, "ssd", target)
    counted, memory = tpu_ssd(tmp_path).values(), [vmem_bytes(tmp_path, name) for name in ("lcx_ssd", "lcx_ssd_backward")]
    with capsys.disabled():
        text = [f"{count:.2f} bundles, {size / 2**20:.1f} MiB" for count, size in zip(counted, memory, strict=True)]
        print(f"\n{target}: forward {text[0]}; backward {text[1]}", end="")
    for count, measured in zip(counted, MEASURED[target], strict=True):
        assert count <= MARGIN * measured
    assert max(memory) <= VMEM
