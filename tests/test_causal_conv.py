"""The short causal convolution against loops, with every gradient; packed documents, rows handed on from shard to shard."""

import functools
import importlib.util

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.ops.causal_conv import causal_conv
from lcx.registry import UserError
from tests.recurrences import QUICK, breaks, compare, normal, packed_segments, part_of, runner
from tests.tolerance import assert_close

OPTIONAL = ("bias_E", "initial_BWE")


def problem(B, S, E, W, seed=0, without=()):
    """(arrays by name, segments, cotangents)."""
    random = np.random.default_rng(seed)
    new = functools.partial(normal, random)
    arrays = dict(x_BSE=new(B, S, E), w_EW=new(E, W), bias_E=new(E), initial_BWE=new(B, W - 1, E))
    arrays = {name: x for name, x in arrays.items() if name not in without}
    return arrays, packed_segments(random, B, S), (new(B, S, E), new(B, W - 1, E))


def by_definition(x_BSE, w_EW, bias_E=None, *, initial_BWE=None, segments_BS=None, activation=None):
    """Every token with every tap of every input as one dense product; concrete segments."""
    (B, S, E), W = x_BSE.shape, w_EW.shape[1]
    segments = np.ones((B, S), int) if segments_BS is None else segments_BS
    before = jnp.zeros((B, W - 1, E)) if initial_BWE is None else initial_BWE
    inputs = jnp.concatenate([before, x_BSE], 1)
    owner = np.concatenate([np.repeat(segments[:, :1], W - 1, 1), segments], 1)
    seen, last = np.zeros((B, S, S + W - 1, W), np.float32), np.zeros((B, W - 1, 1), np.float32)
    for b in range(B):
        for t in range(S):
            for i in range(W):
                seen[b, t, t + i, i] = owner[b, t + i] == segments[b, t]
        for i in range(W - 1):
            last[b, i] = owner[b, S + i] == owner[b, -1] != 0
    total = jnp.einsum("btsi,ei,bse->bte", seen, w_EW, inputs) + (0 if bias_E is None else bias_E[None, None])
    total = total / (1 + jnp.exp(-total)) if activation == "silu" else total
    return total * (segments != 0)[..., None], inputs[:, S:] * last


def expected_of(arrays, segments, cotangents, activation):
    """As from `runner`, the segments being static."""
    f = functools.partial(by_definition, segments_BS=segments, activation=activation)
    return runner(f)(arrays, None, cotangents)


def unequal(segments):
    """So that the last rows are of two documents and the last token is not padding."""
    segments = segments.copy()
    segments[:, -1] = segments.max() + 1
    return segments


CASES = {
    "everything": ((2, 11, 3, 4), (), packed_segments, "silu"),
    "two documents in the last rows": ((2, 9, 2, 4), (), lambda *a: unequal(packed_segments(*a)), None),
    "shorter than the weights, nothing optional": ((1, 2, 2, 4), OPTIONAL, None, "silu"),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_equals_the_definition(name, implementation):
    shape, without, segmented, activation = CASES[name]
    arrays, _, cotangents = problem(*shape, without=without)
    segments = segmented and segmented(np.random.default_rng(3), *shape[:2])
    expected = expected_of(arrays, segments, cotangents, activation)
    run = runner(causal_conv, activation=activation, implementation=implementation)
    compare(run(arrays, segments, cotangents), expected)
    if name == "everything":
        cotangents = cotangents[0], cotangents[1] + 1
        expected = expected_of(arrays, None, cotangents, activation)
        breaks(run, arrays, None, cotangents, expected)
        with pytest.raises(AssertionError):
            compare(run(arrays, segments, cotangents), expected)


@hypothesis.settings(max_examples=3, deadline=None, derandomize=True, database=None)
@hypothesis.given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 3), st.integers(1, 5)),
    activation=st.sampled_from([None, "silu"]),
    without=st.sets(st.sampled_from(OPTIONAL)),
    packed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_the_definition_at_any_shape(shape, activation, without, packed, seed):
    arrays, segments, cotangents = problem(*shape, seed=seed, without=without)
    segments = segments if packed else None
    actual = runner(causal_conv, activation=activation)(arrays, segments, cotangents)
    compare(actual, expected_of(arrays, segments, cotangents, activation))


def test_shards_in_a_row_equal_the_whole():
    """Each shard takes the last inputs of the one before, unless a document begins between them."""
    arrays, _, _ = problem(2, 24, 3, 4)
    segments = np.array([[1] * 8 + [2] * 6 + [3] * 10, [1] * 9 + [2] * 7 + [3] * 5 + [0] * 3], np.int32)
    run = jax.jit(functools.partial(causal_conv, activation="silu"))
    y, final = run(**arrays, segments_BS=segments)

    def in_shards(continues):
        found, rows = [], arrays["initial_BWE"]
        for start in (0, 8, 16):
            part = slice(start, start + 8)
            if start:
                rows = np.where(continues(segments[:, start - 1], segments[:, start])[:, None, None], rows, 0)
            shard = arrays | dict(x_BSE=part_of(arrays["x_BSE"], part), initial_BWE=rows)
            y_BSE, rows = run(**shard, segments_BS=segments[:, part])
            found.append(y_BSE)
        return np.concatenate(found, 1), rows

    for got, expected in zip(in_shards(lambda left, right: left == right), (y, final)):
        np.testing.assert_array_equal(got, expected)
    assert np.any(in_shards(lambda left, right: left == left)[0] != y)


def test_bf16_inputs():
    arrays, segments, cotangents = problem(2, 16, 3, 4)
    narrow = arrays | {name: arrays[name].astype(jnp.bfloat16) for name in ("x_BSE", "initial_BWE")}
    actual = runner(causal_conv, activation="silu")(narrow, segments, cotangents)
    for name in ("y", "final", "dx_BSE", "dinitial_BWE"):
        assert actual[name].dtype == jnp.bfloat16
    assert actual["dw_EW"].dtype == actual["dbias_E"].dtype == jnp.float32
    widened = {name: np.asarray(x, np.float32) for name, x in narrow.items()}
    compare(actual, runner(causal_conv, activation="silu")(widened, segments, cotangents), dtype="bfloat16")


def test_gradients_of_the_rows_in_front_are_rounded_once():
    """Summed in fp32 in bf16 too: what rounding the exact gradient leaves, and not a rounding for each tap."""
    arrays, _, cotangents = problem(2, 64, 48, 7, without=("bias_E",))
    narrow = {name: jnp.asarray(x, jnp.bfloat16) for name, x in arrays.items()}
    widened = {name: np.asarray(x, np.float32) for name, x in narrow.items()}
    cotangents = jnp.asarray(cotangents[0], jnp.bfloat16), jnp.zeros_like(narrow["initial_BWE"])
    exact = runner(causal_conv)(widened, None, tuple(np.asarray(x, np.float32) for x in cotangents))["dinitial_BWE"]
    actual = runner(causal_conv)(narrow, None, cotangents)["dinitial_BWE"]
    np.testing.assert_array_equal(actual, exact.astype(jnp.bfloat16))


def test_only_the_arguments_are_kept_for_the_backward_pass():
    S, E, W = 4096, 64, 4
    shapes = dict(x_BSE=(1, S, E), w_EW=(E, W), bias_E=(E,), segments_BS=(1, S))
    shapes = {name: jax.ShapeDtypeStruct(x, jnp.int32 if name == "segments_BS" else jnp.float32) for name, x in shapes.items()}

    def pullback(x_BSE, w_EW, bias_E, segments_BS):
        run = lambda *a: causal_conv(*a, segments_BS=segments_BS, activation="silu")
        return jax.vjp(run, x_BSE, w_EW, bias_E)[1]

    memory = jax.jit(pullback, compiler_options=QUICK).lower(**shapes).compile().memory_analysis()
    assert memory.output_size_in_bytes <= memory.argument_size_in_bytes + 4 * E * W + S


@pytest.mark.slow  # `auto` takes the kernels there
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="NOT CHECKED: compiling for TPUs needs pip install 'lcx[plan]' (libtpu)"
)
def test_what_moves_on_a_tpu():
    """Forward x and y, and nothing else; backward x, dy and dx, one array written between, and that read twice and x again."""
    from lcx.planning.topologies import topology_mesh

    B, S, E, W = 1, 2**16, 1024, 4
    at = jax.sharding.SingleDeviceSharding(topology_mesh("v5e:2x2", data=-1).devices.flat[0])
    shape = lambda *dims, dtype="float32": jax.ShapeDtypeStruct(dims, jnp.dtype(dtype), sharding=at)
    x, w, b = shape(B, S, E, dtype="bfloat16"), shape(E, W), shape(E)

    def forward(x, w, b, segments):
        return causal_conv(x, w, b, segments_BS=segments, activation="silu")[0]

    def backward(x, w, b, segments, dy):
        return jax.vjp(functools.partial(forward, segments=segments), x, w, b)[1](dy)

    def passes(f, *more):
        found = jax.jit(f).lower(x, w, b, shape(B, S, dtype="int32"), *more).compile().cost_analysis()["bytes accessed"]
        return found / (2 * B * S * E)

    assert passes(forward) < 2.1
    assert passes(backward, x) < 6.1


def test_mistakes_are_one_line():
    arrays, segments, _ = problem(1, 8, 3, 4)
    call = lambda **changed: causal_conv(**(arrays | changed))
    for message, wrong in {
        "x_BSE has shape .*3 dims": dict(x_BSE=arrays["x_BSE"][0]),
        "w_EW has shape .*E=3": dict(w_EW=arrays["w_EW"].T),
        r"initial_BWE has shape .*needs \(1, 3, 3\)": dict(initial_BWE=np.zeros((1, 4, 3), np.float32)),
        "bias_E has dtype int32": dict(bias_E=np.ones(3, np.int32)),
        "segments_BS is float32": dict(segments_BS=segments.astype(np.float32)),
        "activation='sliu' is not known; did you mean 'silu'": dict(activation="sliu"),
        "implementation='chunkd' is not known; did you mean 'chunked'": dict(implementation="chunkd"),
    }.items():
        with pytest.raises(UserError, match=message) as error:
            call(**wrong)
        assert "\n" not in str(error.value)


def test_one_tap_is_a_product():
    arrays, _, _ = problem(1, 8, 3, 1)
    y, final = causal_conv(**arrays)
    assert_close(y, arrays["x_BSE"] * arrays["w_EW"][:, 0] + arrays["bias_E"])
    assert final.shape == (1, 0, 3)
