"""State-space duality: the reference against the selective scan, the chunked form against the reference, every gradient."""

import functools
import math
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.ops import ssd_chunked as chunked
from lcx.ops.selective_scan import selective_scan
from lcx.ops.ssd import ssd
from lcx.registry import UserError
from tests.recurrences import QUICK, breaks, compare, normal, packed_segments, runner
from tests.tolerance import assert_close

BY_TOKEN = ("x_BSHK", "dt_BSH", "B_BSGN", "C_BSGN")
OPTIONAL = ("dt_bias_H", "initial_state_BHKN")


def problem(B, S, H, K, G, N, seed=0, without=()):
    """(arrays by name, segments, cotangents)."""
    random = np.random.default_rng(seed)
    new = functools.partial(normal, random)
    arrays = dict(x_BSHK=new(B, S, H, K), dt_BSH=new(B, S, H) - 1, A_H=-np.exp(new(H)), B_BSGN=new(B, S, G, N))
    arrays |= dict(C_BSGN=new(B, S, G, N), D_H=new(H), dt_bias_H=new(H), initial_state_BHKN=new(B, H, K, N))
    arrays = {name: x for name, x in arrays.items() if name not in without}
    return arrays, packed_segments(random, B, S), (new(B, S, H, K), new(B, H, K, N))


def by_selective_scan(x_BSHK, dt_BSH, A_H, B_BSGN, C_BSGN, D_H, dt_bias_H, initial_state_BHKN, *, segments_BS=None):
    """The same recurrence, whose channels are H K with one rate a head; G = 1."""
    (B, S, H, K), N = x_BSHK.shape, B_BSGN.shape[3]
    channels = lambda x: jnp.repeat(x, K, axis=-1)
    y_BSE, final_BEN = selective_scan(
        x_BSHK.reshape(B, S, H * K),
        channels(dt_BSH),
        jnp.broadcast_to(channels(A_H)[:, None], (H * K, N)),
        B_BSGN[:, :, 0],
        C_BSGN[:, :, 0],
        channels(D_H),
        dt_bias_E=channels(dt_bias_H),
        initial_state_BEN=initial_state_BHKN.reshape(B, H * K, N),
        segments_BS=segments_BS,
        implementation="reference",
    )
    return y_BSE.reshape(x_BSHK.shape), final_BEN.reshape(B, H, K, N)


def test_the_reference_is_a_selective_scan_with_one_rate_a_head():
    arguments = problem(2, 30, 3, 2, 1, 4)
    expected = runner(by_selective_scan)(*arguments)
    run = runner(ssd, implementation="reference")
    compare(run(*arguments), expected)
    breaks(run, *arguments, expected)


CASES = {
    "everything, two groups, the last chunk padded": ((2, 37, 4, 3, 2, 2), (), True, dict(chunk=8, dt_limit=(0.1, 1.0))),
    "nothing optional, one chunk": ((1, 12, 2, 2, 2, 3), OPTIONAL, False, dict(dt_limit=(0.1, 1.0))),
    "strong decay, chunks of 64": ((1, 192, 2, 4, 1, 4), (), False, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_chunked_equals_the_reference(name):
    shape, without, packed, options = CASES[name]
    arrays, segments, cotangents = problem(*shape, without=without)
    segments = segments if packed else None
    if "strong" in name:
        arrays["A_H"] = np.array([-16.0, -0.01], np.float32)
    run, oracle = (runner(ssd, implementation=i, **options) for i in ("chunked", "reference"))
    expected = oracle(arrays, segments, cotangents)
    compare(run(arrays, segments, cotangents), expected)
    breaks(run, arrays, segments, cotangents, expected)


@hypothesis.settings(max_examples=3, deadline=None, derandomize=True, database=None)
@hypothesis.given(
    shape=st.tuples(*(st.integers(1, most) for most in (3, 40, 3, 4))),
    heads=st.integers(1, 3),
    chunk=st.integers(1, 50),
    without=st.sets(st.sampled_from(OPTIONAL)),
    packed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_chunked_equals_the_reference_at_any_shape(shape, heads, chunk, without, packed, seed):
    B, S, G, N = shape
    arrays, segments, cotangents = problem(B, S, G * heads, 2, G, N, seed=seed, without=without)
    segments = segments if packed else None
    actual = runner(ssd, implementation="chunked", chunk=chunk)(arrays, segments, cotangents)
    compare(actual, runner(ssd, implementation="reference")(arrays, segments, cotangents))


def test_packed_documents_equal_separate_ones():
    """Three documents as rows of their own, and one after another with padding between them and behind."""
    length, gap, shared = 13, 5, ("A_H", "D_H", "dt_bias_H")
    arrays, _, (on_y, _) = problem(3, length, 2, 3, 1, 2, without=("initial_state_BHKN",))
    joined = lambda x: np.pad(x, [(0, 0), (0, gap)] + [(0, 0)] * (x.ndim - 2)).reshape(1, 3 * (length + gap), *x.shape[2:])
    packed = {name: x if name in shared else joined(x) for name, x in arrays.items()}
    segments = joined(np.repeat(np.arange(1, 4, dtype=np.int32)[:, None], length, axis=1))
    on_final = np.zeros((3, 2, 3, 2), np.float32)
    on_final[2] = normal(np.random.default_rng(1), 2, 3, 2)
    separate = runner(ssd, chunk=8)(arrays, None, (on_y, on_final))
    separate = {name: x if name[1:] in shared else x[2:] if name == "final" else joined(x) for name, x in separate.items()}
    run, cotangents = runner(ssd, chunk=8), (joined(on_y), on_final[2:])
    compare(run(packed, segments, cotangents), separate)
    with pytest.raises(AssertionError):
        compare(run(packed, np.ones_like(segments), cotangents), separate)
    padding = segments == 0
    fill = lambda x: np.where(padding.reshape(padding.shape + (1,) * (x.ndim - 2)), 7, x).astype(x.dtype)
    compare(run({name: x if name in shared else fill(x) for name, x in packed.items()}, segments, cotangents), separate)


def test_bf16_activations():
    arrays, segments, cotangents = problem(1, 48, 2, 4, 1, 4)
    narrow = {name: x.astype(jnp.bfloat16) if name in BY_TOKEN else x for name, x in arrays.items()}
    actual = runner(ssd, chunk=16)(narrow, segments, cotangents)
    for name, x in actual.items():
        assert x.dtype == (jnp.bfloat16 if name == "y" or name[1:] in BY_TOKEN else jnp.float32), name
    widened = {name: np.asarray(x, np.float32) for name, x in narrow.items()}
    expected = runner(ssd, implementation="reference")(widened, segments, cotangents)
    compare(actual, expected, dtype="bfloat16")
    assert_close(actual["final"], expected["final"])  # states are fp32 throughout
    with pytest.raises(AssertionError):
        assert_close(actual["y"], expected["y"])


def test_log_decays_between_tokens_keep_their_digits():
    """Far into a chunk neighbours are as exact as at its start, where plain differences of sums are not."""
    log = -np.random.default_rng(0).uniform(0, 8, (1, 256, 1)).astype(np.float32)
    log[0, 128] = -1e-3
    exact = np.asarray(log, np.float64).cumsum(1)
    between = chunked._log_between_BHCC(log)[0, 0]
    assert abs(between[128, 127] - log[0, 128, 0]) < 1e-7
    assert_close(np.diag(between, -1), np.diff(exact[0, :, 0]))
    plain = log.cumsum(1)
    assert abs(plain[0, 128, 0] - plain[0, 127, 0] - log[0, 128, 0]) > 1e-6


def test_memory():
    """Kept: the inputs and a state for each chunk; no array of a decay or a state for every token."""
    S, H, K, N = 8192, 4, 32, 64
    shape = dict(x_BSHK=(1, S, H, K), dt_BSH=(1, S, H), A_H=(H,), B_BSGN=(1, S, 1, N), C_BSGN=(1, S, 1, N), D_H=(H,))
    shapes = {name: jax.ShapeDtypeStruct(dims, jnp.float32) for name, dims in shape.items()}
    kept = jax.jit(lambda arrays: jax.vjp(lambda a: ssd(**a), arrays)).lower(shapes).compile().memory_analysis()
    states = kept.output_size_in_bytes - 4 * (S * H * K + H * K * N) - kept.argument_size_in_bytes
    assert 0 < states <= 4 * H * K * N * (S // 64) + S

    def largest(chunk):
        f = jax.jit(jax.grad(lambda arrays: ssd(**arrays, chunk=chunk)[0].sum()), compiler_options=QUICK)
        found = re.findall(r"f32\[([\d,]+)\]", f.lower(shapes).compile().as_text())
        return max(math.prod(map(int, dims.split(","))) for dims in set(found))

    assert largest(None) <= S * H * K * N // 64
    assert largest(1024) > S * H * K * N // 64  # the twin


def test_chunks_follow_the_state_size():
    assert [chunked.chunk_of(2**20, N) for N in (16, 64, 128, 512)] == [64, 64, 128, 256]
    assert chunked.chunk_of(65, 64) == 33
    assert chunked.chunk_of(100, 64, 7) == 7


def test_mistakes_are_one_line():
    arrays, segments, _ = problem(1, 8, 4, 2, 2, 3)
    call = lambda **changed: ssd(**(arrays | changed))
    for message, wrong in {
        "x_BSHK has shape .*4 dims": dict(x_BSHK=arrays["x_BSHK"][0]),
        "H=4 heads cannot be divided among G=3 groups": dict(B_BSGN=np.ones((1, 8, 3, 3), np.float32)),
        r"C_BSGN has shape .*needs \(1, 8, 2, 3\)": dict(C_BSGN=arrays["C_BSGN"][:, 1:]),
        "A_H has dtype int32": dict(A_H=np.ones(4, np.int32)),
        r"dt_limit=\(1, 0\)": dict(dt_limit=(1, 0)),
        "chunk=0": dict(chunk=0),
        "segments_BS is float32": dict(segments_BS=segments.astype(np.float32)),
        "did you mean 'chunked'": dict(implementation="chunk"),
    }.items():
        with pytest.raises(UserError, match=message) as error:
            call(**wrong)
        assert "\n" not in str(error.value)
