"""The Triton kernels of the convolution, interpreted: against the reference, and what they refuse.

A token of a block of channels takes the interpreter milliseconds, so shapes are tiny. `tests/cuda` compiles the same kernels.
"""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton

from lcx.ops.causal_conv import causal_conv
from lcx.parallel import recurrences
from lcx.registry import UserError
from pallas_kernels import causal_conv_triton, interpret
from tests.recurrences import breaks, compare, runner
from tests.test_causal_conv import OPTIONAL, problem, unequal


@pytest.fixture(scope="module", autouse=True)
def short():
    """Stretches of 8 tokens and blocks of 4 channels, so that small problems have several."""
    with pytest.MonkeyPatch.context() as patch:
        for name, size in dict(LONGEST=8, SHORTEST=8, BLOCK=4, UNROLLED=3).items():
            patch.setattr(causal_conv_triton, name, size)
        yield


def test_it_equals_the_reference():
    """Two rows of other documents; two blocks of channels, the second of 2; three stretches, the last of 1 token; padding,
    everything optional."""
    arrays, segments, cotangents = problem(2, 17, 6, 4)
    segments = unequal(segments)
    expected = runner(causal_conv, implementation="reference", activation="silu")(arrays, segments, cotangents)
    run = runner(causal_conv, implementation="triton", activation="silu")
    with interpret.interpreted():
        compare(run(arrays, segments, cotangents), expected)
        breaks(run, arrays, segments, cotangents, expected)


def test_it_equals_the_reference_in_bf16():
    """One document a row, nothing optional, no activation, two rows of a whole stretch."""
    arrays, _, cotangents = problem(2, 8, 4, 4, without=OPTIONAL)
    narrow = arrays | dict(x_BSE=arrays["x_BSE"].astype(jnp.bfloat16))
    widened = {name: np.asarray(x, np.float32) for name, x in narrow.items()}
    expected = runner(causal_conv, implementation="reference")(widened, None, cotangents)
    run = runner(causal_conv, implementation="triton")
    with interpret.interpreted():
        actual = run(narrow, None, cotangents)
        assert {name for name, x in actual.items() if x.dtype == jnp.bfloat16} == {"y", "final", "dx_BSE"}
        compare(actual, expected, dtype="bfloat16")
        for changed in (dict(x_BSE=narrow["x_BSE"] * 1.125), dict(w_EW=arrays["w_EW"] * np.float32(1.125))):
            with pytest.raises(AssertionError):
                compare(run(narrow | changed, None, cotangents), expected, dtype="bfloat16")


@pytest.mark.parametrize(("tokens", "width"), [(2, 4), (9, 1), (12, 7)])
def test_rows_shorter_than_the_weights_and_other_widths(tokens, width):
    arrays, segments, cotangents = problem(1, tokens, 4, width)
    segments = unequal(segments) if tokens > 2 else None
    expected = runner(causal_conv, implementation="reference", activation="silu")(arrays, segments, cotangents)
    with interpret.interpreted():
        compare(runner(causal_conv, implementation="triton", activation="silu")(arrays, segments, cotangents), expected)


@functools.cache
def packed(implementation: str):
    """Compiled once: two stretches, the second of 2 tokens."""
    run = runner(causal_conv, implementation=implementation, activation="silu")
    return lambda arrays, segments, cotangents: run(arrays, jnp.asarray(segments), cotangents)


@hypothesis.settings(max_examples=4, deadline=None, derandomize=True, database=None)
@hypothesis.given(segments=st.lists(st.integers(0, 2), min_size=20, max_size=20), seed=st.integers(0, 99))
def test_documents_of_any_length_and_order(segments, seed):
    """Ids that come again, padding anywhere and not a number there."""
    arrays, _, cotangents = problem(2, 10, 4, 3, seed=seed)
    segments = np.array(segments, np.int32).reshape(2, 10)
    arrays["x_BSE"] = np.where((segments == 0)[..., None], np.float32(np.nan), arrays["x_BSE"])
    expected = packed("reference")(arrays, segments, cotangents)
    with interpret.interpreted():
        compare(packed("triton")(arrays, segments, cotangents), expected)


def test_under_vmap():
    """As one call of all rows."""
    arrays, segments, _ = problem(2, 9, 4, 3, without=OPTIONAL)
    run = functools.partial(causal_conv, w_EW=arrays["w_EW"], implementation="triton", activation="silu")
    row = lambda x, segments: run(x[None], segments_BS=segments[None])[0][0]
    with interpret.interpreted():
        np.testing.assert_array_equal(
            jax.jit(jax.vmap(row))(arrays["x_BSE"], segments), run(arrays["x_BSE"], segments_BS=segments)[0]
        )


def test_over_devices_it_equals_the_whole(mesh_of):
    """Rows handed from device to device, and gradients, with every mesh axis manual."""
    arrays, segments, (dy, _) = problem(1, 16, 4, 4, without=("initial_BWE",))

    def results(arrays, segments, mesh, implementation):
        options = dict(segments_BS=segments, activation="silu", implementation=implementation)
        y, pull = jax.vjp(lambda arrays: recurrences.causal_conv(**arrays, mesh=mesh, **options), arrays)
        return dict(y=y) | {f"d{name}": x for name, x in pull(jnp.asarray(dy))[0].items()}

    def on(mesh, implementation, segments):
        with jax.set_mesh(mesh), interpret.interpreted():
            run = functools.partial(results, mesh=mesh, implementation=implementation)
            return jax.jit(run)(arrays, jnp.asarray(segments))

    actual = on(mesh_of(seq=4), "triton", segments)
    compare(actual, on(mesh_of(), "reference", segments))
    # The twin: where no rows are handed on, it is as if a document began on every device.
    lost = np.where(segments == 0, 0, segments + 8 * (np.arange(16) // 4)[None]).astype(np.int32)
    with pytest.raises(AssertionError):
        compare(actual, on(mesh_of(), "reference", lost))


# Where it runs.


def call(E=4, W=4, dtype=jnp.float32):
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, dtype)
    return jax.eval_shape(functools.partial(causal_conv, implementation="triton"), shape(1, 8, E), shape(E, W))


def test_it_says_why_it_does_not_run_here(monkeypatch):
    with pytest.raises(UserError, match="'triton' cannot run on cpu: triton: it is for H100, H200, GH200 and this is cpu"):
        call()
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with interpret.interpreted(), pytest.raises(UserError, match="Triton needs TRITON_INTERPRET=1 in the environment"):
        call()


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (dict(W=8), "W=8 taps; it takes at most 7"),
        (dict(dtype=jnp.float16), "x_BSE has dtype float16; it takes bfloat16 and float32"),
    ],
)
def test_what_it_refuses(changed, reason):
    with interpret.interpreted(), pytest.raises(UserError, match=reason):
        call(**changed)


def test_how_rows_are_cut(monkeypatch):
    """Programs enough for a large GPU, each of tokens enough that its sums are little."""
    monkeypatch.setattr(causal_conv_triton, "BLOCK", 128)
    monkeypatch.setattr(causal_conv_triton, "LONGEST", 512)
    monkeypatch.setattr(causal_conv_triton, "SHORTEST", 32)
    assert causal_conv_triton.stretch(1, 2**20, 2048) == 512
    assert causal_conv_triton.stretch(1, 2**15, 2048) == 128
    assert causal_conv_triton.stretch(1, 2**10, 256) == 32
    assert causal_conv_triton.stretch(1, 2**25, 128) == 1024  # no more than CUDA starts in a grid's second dim
