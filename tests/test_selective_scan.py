"""The selective scan: the reference against loops in fp64, the chunked form against the reference, every gradient; memory."""

import functools
import math
import re
import time

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lcx.ops import selective_scan_chunked as chunked
from lcx.ops.selective_scan import selective_scan
from lcx.registry import UserError
from tests.recurrences import QUICK, breaks, compare, normal, packed_segments, runner
from tests.tolerance import assert_close

BY_TOKEN = ("u_BSE", "dt_BSE", "B_BSN", "C_BSN", "z_BSE")
OPTIONAL = ("z_BSE", "dt_bias_E", "initial_state_BEN")


def problem(B, S, E, N, seed=0, without=()):
    """(arrays by name, segments, cotangents)."""
    random = np.random.default_rng(seed)
    new = functools.partial(normal, random)
    arrays = dict(u_BSE=new(B, S, E), dt_BSE=new(B, S, E) - 1, A_EN=-np.exp(new(E, N)), B_BSN=new(B, S, N), C_BSN=new(B, S, N))
    arrays |= dict(D_E=new(E), z_BSE=new(B, S, E), dt_bias_E=new(E), initial_state_BEN=new(B, E, N))
    arrays = {name: x for name, x in arrays.items() if name not in without}
    return arrays, packed_segments(random, B, S), (new(B, S, E), new(B, E, N))


def by_definition(a, segments):
    """(y, final state): the recurrence in loops, fp64, from nothing in lcx."""
    a = {name: np.asarray(x, np.float64) for name, x in a.items()}
    (B, S, _), y = a["u_BSE"].shape, np.zeros(a["u_BSE"].shape)
    final = np.zeros((B, *a["A_EN"].shape))
    for b in range(B):
        h = a["initial_state_BEN"][b]
        for t in range(S):
            if segments[b, t] == 0:
                continue
            if t > 0 and segments[b, t] != segments[b, t - 1]:
                h = h * 0
            dt = np.log1p(np.exp(a["dt_BSE"][b, t] + a["dt_bias_E"]))[:, None]
            h = np.exp(dt * a["A_EN"]) * h + dt * a["u_BSE"][b, t][:, None] * a["B_BSN"][b, t][None]
            z = a["z_BSE"][b, t]
            y[b, t] = ((h * a["C_BSN"][b, t][None]).sum(1) + a["D_E"] * a["u_BSE"][b, t]) * z / (1 + np.exp(-z))
        final[b] = h
    return y, final


@pytest.fixture
def short_chunks(monkeypatch):
    """Chunks of 8 tokens at most, so that short rows have several."""
    monkeypatch.setattr(chunked, "CHUNK", 8)
    monkeypatch.setattr(chunked, "CACHED", 0)


def test_the_reference_is_the_definition():
    arrays, segments, _ = problem(2, 40, 3, 4)
    run = jax.jit(functools.partial(selective_scan, implementation="reference"))
    for got, expected in zip(run(**arrays, segments_BS=segments), by_definition(arrays, segments)):
        assert_close(got, expected)
    with pytest.raises(AssertionError):
        assert_close(run(**arrays)[0], by_definition(arrays, segments)[0])


CASES = {
    "everything, 5 chunks of 8, the last padded": ((2, 37, 3, 4), (), True, True),
    "nothing optional, two tokens": ((1, 2, 2, 1), OPTIONAL, False, True),
    "no gate, dt as it is": ((1, 24, 4, 2), ("z_BSE", "dt_bias_E"), True, False),
}


@pytest.mark.parametrize("name", CASES)
def test_chunked_equals_the_reference(name, short_chunks):
    shape, without, packed, softplus = CASES[name]
    arrays, segments, cotangents = problem(*shape, without=without)
    segments = segments if packed else None
    if not softplus:
        arrays["dt_BSE"] = np.exp(arrays["dt_BSE"])
    run, oracle = (runner(selective_scan, implementation=i, dt_softplus=softplus) for i in ("chunked", "reference"))
    expected = oracle(arrays, segments, cotangents)
    compare(run(arrays, segments, cotangents), expected)
    breaks(run, arrays, segments, cotangents, expected)


@hypothesis.settings(max_examples=4, deadline=None, derandomize=True, database=None)
@hypothesis.given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 5), st.integers(1, 4)),
    chunk=st.integers(1, 17),
    without=st.sets(st.sampled_from(OPTIONAL)),
    packed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_chunked_equals_the_reference_at_any_shape(shape, chunk, without, packed, seed):
    arrays, segments, cotangents = problem(*shape, seed=seed, without=without)
    segments = segments if packed else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "CHUNK", chunk)
        patch.setattr(chunked, "CACHED", 0)
        actual = runner(selective_scan, implementation="chunked")(arrays, segments, cotangents)
    compare(actual, runner(selective_scan, implementation="reference")(arrays, segments, cotangents))


def test_packed_documents_equal_separate_ones(short_chunks):
    """Three documents as rows of their own, and one after another with padding between them and behind."""
    length, gap, shared = 13, 5, ("A_EN", "D_E", "dt_bias_E")
    arrays, _, (on_y, _) = problem(3, length, 3, 2, without=("initial_state_BEN",))
    joined = lambda x: np.pad(x, [(0, 0), (0, gap)] + [(0, 0)] * (x.ndim - 2)).reshape(1, 3 * (length + gap), *x.shape[2:])
    packed = {name: x if name in shared else joined(x) for name, x in arrays.items()}
    segments = joined(np.repeat(np.arange(1, 4, dtype=np.int32)[:, None], length, axis=1))
    random = np.random.default_rng(1)
    on_final = np.zeros((3, 3, 2), np.float32)
    on_final[2] = normal(random, 3, 2)
    separate = dict(runner(selective_scan)(arrays, None, (on_y, on_final)))
    separate = {name: x if name[1:] in shared else x[2:] if name == "final" else joined(x) for name, x in separate.items()}
    run, cotangents = runner(selective_scan), (joined(on_y), on_final[2:])
    compare(run(packed, segments, cotangents), separate)
    with pytest.raises(AssertionError):
        compare(run(packed, np.ones_like(segments), cotangents), separate)
    # whatever stands in the padding, infinities apart
    padding = segments == 0
    dirty = {name: x if name in shared else np.where(padding[..., None], 7, x).astype(x.dtype) for name, x in packed.items()}
    compare(run(dirty, segments, cotangents), separate)


def test_bf16_activations():
    arrays, segments, cotangents = problem(1, 48, 4, 4)
    fp32 = runner(selective_scan, implementation="reference")(arrays, segments, cotangents)
    narrow = {name: x.astype(jnp.bfloat16) if name[-3:] in ("BSE", "BSN") else x for name, x in arrays.items()}
    actual = runner(selective_scan)(narrow, segments, cotangents)
    for name, x in actual.items():
        assert x.dtype == (jnp.bfloat16 if name == "y" or name[-3:] in ("BSE", "BSN") else jnp.float32), name
    widened = {name: np.asarray(x, np.float32) for name, x in narrow.items()}
    same_inputs = runner(selective_scan, implementation="reference")(widened, segments, cotangents)
    compare(actual, same_inputs, dtype="bfloat16")
    assert_close(actual["final"], same_inputs["final"])  # states are fp32 throughout
    with pytest.raises(AssertionError):
        assert_close(actual["final"], fp32["final"])


def shapes_of(S, E, N, dtype=jnp.float32):
    per_token = {name: jax.ShapeDtypeStruct((1, S, E), dtype) for name in ("u_BSE", "dt_BSE")}
    per_token |= {name: jax.ShapeDtypeStruct((1, S, N), dtype) for name in ("B_BSN", "C_BSN")}
    return per_token | dict(A_EN=jax.ShapeDtypeStruct((E, N), jnp.float32), D_E=jax.ShapeDtypeStruct((E,), jnp.float32))


def associative(u_BSE, dt_BSE, A_EN, B_BSN, C_BSN, D_E):
    """The usual parallel form, for comparison."""
    dt = jax.nn.softplus(dt_BSE)
    a = jnp.exp(dt[..., None] * A_EN[None, None])
    b = (dt * u_BSE)[..., None] * B_BSN[:, :, None]
    h = lax.associative_scan(lambda x, y: (y[0] * x[0], y[0] * x[1] + y[1]), (a, b), axis=1)[1]
    return (h * C_BSN[:, :, None]).sum(-1) + D_E[None, None] * u_BSE, h[:, -1]


def gradient_of(op):
    return jax.jit(jax.grad(lambda arrays: op(**arrays)[0].sum()), compiler_options=QUICK)


def test_what_is_kept_for_the_backward_pass():
    """Besides the inputs only the states between chunks: 1 KiB a token at E=2048, N=16, as the compiler lays them out."""
    S, E, N = 2048, 2048, 16
    compiled = jax.jit(lambda arrays: jax.vjp(lambda a: selective_scan(**a), arrays)).lower(shapes_of(S, E, N)).compile()
    memory = compiled.memory_analysis()
    outputs = 4 * (S * E + E * N)
    kept = memory.output_size_in_bytes - outputs - memory.argument_size_in_bytes
    assert 0 < kept <= (1024 + 1) * S  # a byte a token for the tables of buffers
    assert memory.temp_size_in_bytes < 4 * S * E  # and no array of all states exists on the way


def test_memory_against_an_associative_scan():
    """A twentieth of its temporary memory at 32K tokens, and no array of all states in the program."""
    S, E, N = 32_768, 2048, 16
    ours, theirs = (gradient_of(op).lower(shapes_of(S, E, N)).compile() for op in (selective_scan, associative))
    temp = lambda compiled: compiled.memory_analysis().temp_size_in_bytes
    assert 20 * temp(ours) <= temp(theirs)
    arrays = lambda compiled: re.findall(r"f32\[([\d,]+)\]", compiled.as_text())
    largest = lambda compiled: max(math.prod(map(int, dims.split(","))) for dims in set(arrays(compiled)))
    assert largest(ours) < 2 * S * E
    assert largest(theirs) >= S * E * N  # the twin


def test_chunks_are_equal_and_short_where_the_cache_holds_them():
    assert chunked.chunk_of(1_048_576, 128 * 16) == 32
    assert chunked.chunk_of(1_048_576, 2048 * 16) == 128
    assert chunked.chunk_of(129, 2048 * 16) == 65
    assert chunked.chunk_of(5, 4) == 5


@pytest.mark.slow
def test_it_is_not_slower_than_an_associative_scan():
    """Forward and backward, 32K tokens, in one process; the smallest of three times each."""
    random = np.random.default_rng(0)
    arrays = {name: normal(random, *x.shape) for name, x in shapes_of(32_768, 64, 16).items()}
    arrays["A_EN"] = -np.exp(arrays["A_EN"])
    arrays = jax.device_put(arrays)
    runs = [jax.jit(jax.grad(lambda a, op=op: op(**a)[0].sum())).lower(arrays).compile() for op in (selective_scan, associative)]

    def seconds(run):
        start = time.perf_counter()
        jax.block_until_ready(run(arrays))
        return time.perf_counter() - start

    ours, theirs = (min(seconds(run) for _ in range(3)) for run in runs)
    assert ours <= theirs, (ours, theirs)


def test_mistakes_are_one_line():
    arrays, segments, _ = problem(1, 8, 3, 2)
    call = lambda **changed: selective_scan(**(arrays | changed))
    for message, wrong in {
        "u_BSE has shape .*3 dims": dict(u_BSE=arrays["u_BSE"][0]),
        "A_EN has shape .*E=3": dict(A_EN=arrays["A_EN"].T),
        r"dt_BSE has shape .*needs \(1, 8, 3\)": dict(dt_BSE=arrays["dt_BSE"][:, 1:]),
        "initial_state_BEN has shape": dict(initial_state_BEN=arrays["initial_state_BEN"][..., None]),
        "z_BSE has dtype int32": dict(z_BSE=np.ones((1, 8, 3), np.int32)),
        "segments_BS is float32": dict(segments_BS=segments.astype(np.float32)),
        "did you mean 'chunked'": dict(implementation="chunk"),
    }.items():
        with pytest.raises(UserError, match=message) as error:
            call(**wrong)
        assert "\n" not in str(error.value)
    long = shapes_of(16_385, 2, 1)
    with pytest.raises(UserError, match="at most 16384 tokens, not 16385"):
        jax.eval_shape(lambda a: selective_scan(**a, implementation="reference"), long)
