"""The Triton kernels of state-space duality: interpreted against the reference, how a call is divided, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.ops import ssd_chunked as chunked
from lcx.ops.recurrence import marks
from lcx.ops.ssd import Inputs, SsdSpec, ssd
from lcx.parallel import recurrences
from lcx.registry import UserError
from pallas_kernels import interpret, ssd_triton, ssd_triton_cut
from tests.recurrences import breaks, compare, compare_over_devices, compare_summaries, ignores_padding, runner
from tests.test_ssd import BY_TOKEN, OPTIONAL, problem
from tests.tolerance import rms_ratio


@pytest.fixture
def short(monkeypatch):
    """Chunks of 16 tokens, two to a block, one block to a segment, so that short rows have several; heads of 32 in two parts."""
    sizes = dict(CHUNK=16, CHUNKS=2, LEAST=1, WIDTH=16)
    for name, size in sizes.items():
        monkeypatch.setattr(ssd_triton_cut, name, size)
        if hasattr(ssd_triton, name):
            monkeypatch.setattr(ssd_triton, name, size)


def test_it_equals_the_reference(short):
    """Two groups of two heads; the last chunk of 5 tokens; documents, padding, limits; two segments."""
    arrays, segments, cotangents = problem(1, 37, 4, 16, 2, 16)
    limits = dict(dt_limit=(0.1, 1.0))
    expected = runner(ssd, implementation="reference", **limits)(arrays, segments, cotangents)
    run = runner(ssd, implementation="triton", **limits)
    with interpret.interpreted():
        actual = run(arrays, segments, cotangents)
        compare(actual, expected)
        for name, again in run(arrays, segments, cotangents).items():
            np.testing.assert_array_equal(actual[name], again, err_msg=name)


def test_whatever_is_changed_is_noticed(short):
    arrays, segments, cotangents = problem(1, 20, 1, 16, 1, 16)
    expected = runner(ssd, implementation="reference")(arrays, segments, cotangents)
    run = runner(ssd, implementation="triton")
    with interpret.interpreted():
        compare(run(arrays, segments, cotangents), expected)
        breaks(run, arrays, segments, cotangents, expected)


def test_rows_in_stripes(short, monkeypatch):
    """Three segments, of which one head forgets all of the first and one nothing; backward one block at a time."""
    monkeypatch.setattr(ssd_triton_cut, "STRIPE", 1)
    arrays, _, cotangents = problem(1, 80, 2, 16, 1, 16)
    arrays["A_H"] = np.array([-16.0, -0.01], np.float32)
    expected = runner(ssd, implementation="reference")(arrays, None, cotangents)
    run = runner(ssd, implementation="triton")
    cut = ssd_triton_cut.Cut(Inputs(**without_state(arrays)))
    assert (cut.segments(cut.blocks), cut.stripes) == ((1, 3), 3)
    with interpret.interpreted():
        compare(run(arrays, None, cotangents), expected)
        with pytest.raises(AssertionError):
            compare(run(arrays | dict(A_H=arrays["A_H"] * 1.001), None, cotangents), expected)


def test_it_equals_the_reference_as_on_a_device():
    """Whole chunks of 64, strong and weak decay, packed documents."""
    arrays, segments, cotangents = problem(1, 100, 2, 64, 1, 32)
    arrays["A_H"] = np.array([-16.0, -0.01], np.float32)
    expected = runner(ssd, implementation="reference")(arrays, segments, cotangents)
    with interpret.interpreted():
        compare(runner(ssd, implementation="triton")(arrays, segments, cotangents), expected)


def test_it_equals_the_reference_in_bf16(short):
    """Nothing optional, dt as it is, whole blocks; heads of two programs; states are fp32 throughout."""
    arrays, _, cotangents = problem(1, 64, 2, 32, 1, 32, without=OPTIONAL)
    arrays["dt_BSH"] = np.exp(arrays["dt_BSH"])
    narrow = {name: x.astype(jnp.bfloat16) if name in BY_TOKEN else x for name, x in arrays.items()}
    widened = {name: np.asarray(x, np.float32) for name, x in narrow.items()}
    expected = runner(ssd, implementation="reference", dt_softplus=False)(widened, None, cotangents)
    run = runner(ssd, implementation="triton", dt_softplus=False)
    with interpret.interpreted():
        actual = run(narrow, None, cotangents)
        for name, x in actual.items():
            assert x.dtype == (jnp.bfloat16 if name == "y" or name[1:] in BY_TOKEN else jnp.float32), name
        compare(actual, expected, dtype="bfloat16")
        # Two parts of each factor, of which the interpreter cuts off what a GPU rounds: there it is as in the next test.
        assert rms_ratio(actual["final"], expected["final"]) < 2e-5
        with pytest.raises(AssertionError):
            compare(run(narrow | dict(dt_BSH=narrow["dt_BSH"] * 1.125), None, cotangents), expected, dtype="bfloat16")


def test_packed_rows_in_bf16(short, monkeypatch):
    """Everything optional, and segments of two blocks of two chunks, as on a device."""
    monkeypatch.setattr(ssd_triton_cut, "LEAST", 2)
    arrays, segments, cotangents = problem(1, 120, 2, 16, 1, 16)
    narrow = {name: x.astype(jnp.bfloat16) if name in BY_TOKEN else x for name, x in arrays.items()}
    widened = {name: np.asarray(x, np.float32) for name, x in narrow.items()}
    expected = runner(ssd, implementation="reference")(widened, segments, cotangents)
    run = runner(ssd, implementation="triton")
    with interpret.interpreted():
        compare(run(widened, segments, cotangents), expected)
        compare(run(narrow, segments, cotangents), expected, dtype="bfloat16")
        with pytest.raises(AssertionError):
            compare(run(narrow, np.roll(segments, 1, axis=1), cotangents), expected, dtype="bfloat16")


def test_two_parts_in_bf16_are_almost_fp32():
    """Over the table's limit for fp32: a third part, for what nobody sees behind inputs of 8 bits, is not worth a product."""
    x = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    rounded = lambda x: np.asarray(x.astype(jnp.bfloat16), np.float32)
    assert 1e-6 < rms_ratio(rounded(x) + rounded(x - rounded(x)), x) < 3e-6


def without_state(arrays):
    return {name: jnp.asarray(x) for name, x in arrays.items() if name != "initial_state_BHKN"}


def test_the_summaries_of_a_stretch(short):
    """Against those of the chunked implementation: rows with documents that start inside, and one without."""
    arrays, segments, (dy, _) = problem(2, 75, 2, 16, 1, 16)
    segments[1] = 1
    inputs, spec = Inputs(**without_state(arrays), marks=marks(jnp.asarray(segments))), SsdSpec()
    compare_summaries(ssd_triton, chunked, inputs, spec, dy, inputs._replace(A_H=inputs.A_H * 1.001))


@pytest.mark.parametrize("reverse", [False, True])
def test_a_walk_ends_where_nothing_is_left(short, reverse):
    """What a stretch forgets is not even read: it may be no number. Unless it is not forgotten."""
    arrays, _, (dy, _) = problem(1, 96, 1, 16, 1, 16)
    inputs = Inputs(**without_state(arrays | dict(dt_BSH=np.ones((1, 96, 1), np.float32))))
    far = slice(64, None) if reverse else slice(0, 32)
    of = (lambda x: ssd_triton.reverse_summary(x, jnp.asarray(dy).at[:, far].set(jnp.nan), spec=SsdSpec())) if reverse else None
    of = of or (lambda x: ssd_triton.summary(x._replace(x_BSHK=x.x_BSHK.at[:, far].set(jnp.nan)), spec=SsdSpec()))
    # Of the three blocks all are one segment.
    with interpret.interpreted(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssd_triton_cut, "LEAST", 3)
        assert np.isfinite(of(inputs._replace(A_H=jnp.full(1, -6.0))).state).all()
        assert np.isnan(of(inputs._replace(A_H=jnp.full(1, -0.1))).state).any()


def test_over_devices_it_equals_the_whole(short, mesh_of, monkeypatch):
    """Summaries, states passed between devices, and gradients, with every mesh axis manual; two stripes on each device."""
    monkeypatch.setattr(ssd_triton_cut, "STRIPE", 1)
    arrays, segments, (dy, _) = problem(1, 72, 1, 16, 1, 16, without=("initial_state_BHKN",))
    compare_over_devices(recurrences.ssd, arrays, segments, dy, mesh_of(), mesh_of(seq=2), "triton")


def test_padding_may_hold_anything(short):
    ignores_padding(runner(ssd, implementation="triton"), *problem(1, 43, 1, 16, 1, 16), BY_TOKEN)


# How a call is divided.


def shapes(B=1, S=8, H=2, K=64, G=1, N=64, dtype=jnp.float32):
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, dtype)
    arrays = dict(x_BSHK=shape(B, S, H, K), dt_BSH=shape(B, S, H), A_H=jax.ShapeDtypeStruct((H,), jnp.float32))
    return arrays | dict(B_BSGN=shape(B, S, G, N), C_BSGN=shape(B, S, G, N), D_H=jax.ShapeDtypeStruct((H,), jnp.float32))


@pytest.mark.parametrize(
    ("size", "segments", "stripes"),
    [
        (dict(S=2**20, H=32), (128, 32), 16),
        (dict(S=2**20, H=64, K=128), (512, 8), 64),
        (dict(B=64, S=4096, H=32), (16, 1), 4),
        (dict(S=1000, H=8), (4, 1), 1),
        (dict(S=2**24, H=1, K=16), (64, 1024), 8),
    ],
)
def test_segments_and_stripes(size, segments, stripes):
    """About a thousand programs, and bounded memory between the kernels of the backward pass."""
    cut = ssd_triton_cut.Cut(Inputs(**shapes(**size)))
    assert (cut.segments(cut.blocks), cut.stripes) == (segments, stripes)


# Where it runs.


def call(changed=None, **options):
    return jax.eval_shape(functools.partial(ssd, implementation="triton", **options), **shapes(**(changed or {})))


def test_it_says_why_it_does_not_run_here():
    with pytest.raises(UserError, match="'triton' cannot run on cpu: triton: it is for H100, H200, GH200 and this is cpu"):
        call()


@pytest.mark.parametrize(
    ("changed", "options", "reason"),
    [
        (dict(K=96), {}, "head width K=96; it takes 16, 32, 64, 128, 256"),
        (dict(N=192), {}, "state size N=192; it takes 16, 32, 64, 128, 256"),
        (dict(N=256), {}, "state size N=256 in float32; it takes at most 128"),
        ({}, dict(chunk=128), "chunk=128; it takes 64, or None"),
        (dict(dtype=jnp.float16), {}, "x_BSHK has dtype float16; it takes bfloat16 and float32"),
    ],
)
def test_what_it_refuses(changed, options, reason):
    with interpret.interpreted(), pytest.raises(UserError, match=reason):
        call(changed, **options)


def test_a_mesh_that_is_left_to_the_compiler_is_refused(mesh_of):
    with (
        interpret.interpreted(),
        jax.set_mesh(mesh_of(data=2)),
        pytest.raises(UserError, match="mesh axes data, fsdp, seq, tensor"),
    ):
        call()
