"""The Triton kernels of the selective scan, interpreted: against the reference, stopped early, over devices, what they refuse.

A token of a block of channels takes the interpreter 20 ms in the forward kernels and 60 ms backward, so shapes are tiny.
`tests/cuda` compiles the same kernels for a GPU.
"""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton
import triton.language as tl

from lcx.ops import selective_scan_chunked as chunked
from lcx.ops.recurrence import marks
from lcx.ops.selective_scan import Inputs, ScanSpec, selective_scan
from lcx.parallel import recurrences
from lcx.registry import UserError
from pallas_kernels import interpret, selective_scan_triton, selective_scan_triton_cut, selective_scan_triton_token
from pallas_kernels.selective_scan_triton_token import softplus
from pallas_kernels.triton_launch import launch
from tests.recurrences import compare, compare_over_devices, compare_summaries, runner
from tests.test_selective_scan import OPTIONAL, problem
from tests.tolerance import assert_close

SHORT = dict(CHUNK=8, GROUP=2, UNROLLED=4, SHORTEST=8)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Chunks and segments of 8 tokens, so that short rows have several; groups of 2; 4 to a turn, so that some are not full."""
    for name, tokens in SHORT.items():
        monkeypatch.setattr(selective_scan_triton_cut, name, tokens)


def segments_of(arrays) -> tuple[int, int]:
    inputs = Inputs(**{name: jnp.asarray(x) for name, x in arrays.items() if name != "initial_state_BEN"})
    cut = selective_scan_triton_cut.Cut(inputs, ScanSpec())
    return cut.forward_segments()[1], cut.backward_segments()[1]


def test_it_equals_the_reference():
    """Two blocks of channels backward, the second of 4; three segments, the last of 7 tokens; documents, padding, all options."""
    arrays, segments, cotangents = problem(1, 23, 36, 9)
    assert segments_of(arrays) == (3, 3)
    expected = runner(selective_scan, implementation="reference")(arrays, segments, cotangents)
    run = runner(selective_scan, implementation="triton")
    with interpret.interpreted():
        compare(run(arrays, segments, cotangents), expected)
        moved = run(arrays, np.roll(segments, 1, axis=1), cotangents)
    for name in expected:  # the twin: documents that begin a token later
        with pytest.raises(AssertionError):
            assert_close(moved[name], expected[name], gradient=True)


def test_segments_of_several_chunks(monkeypatch):
    """Chunks of four groups, three to a segment; one program adds up dB and dC of two blocks of channels."""
    monkeypatch.setattr(selective_scan_triton_cut, "SHORTEST", 16)
    monkeypatch.setattr(selective_scan_triton_cut, "BACKWARD_PROGRAMS", 2)
    arrays, segments, cotangents = problem(1, 39, 36, 9)
    inputs = Inputs(**{name: jnp.asarray(x) for name, x in arrays.items() if name != "initial_state_BEN"})
    assert selective_scan_triton_cut.Cut(inputs, ScanSpec()).backward_segments() == (24, 2, 2)
    expected = runner(selective_scan, implementation="reference")(arrays, segments, cotangents)
    run = runner(selective_scan, implementation="triton")
    with interpret.interpreted():
        compare(run(arrays, segments, cotangents), expected)
        with pytest.raises(AssertionError):
            compare(run(arrays | dict(A_EN=arrays["A_EN"] * np.float32(1.001)), segments, cotangents), expected)


def test_it_equals_the_reference_in_bf16(monkeypatch):
    """Nothing optional, dt as it is, two rows; two blocks of channels whose dB and dC one program adds up."""
    monkeypatch.setattr(selective_scan_triton_cut, "BACKWARD_PROGRAMS", 2)
    arrays, _, cotangents = problem(2, 8, 64, 9, without=OPTIONAL)
    arrays["dt_BSE"] = np.exp(arrays["dt_BSE"])
    narrow = {name: x.astype(jnp.bfloat16) if name[-3:] in ("BSE", "BSN") else x for name, x in arrays.items()}
    widened = {name: np.asarray(x, np.float32) for name, x in narrow.items()}
    expected = runner(selective_scan, implementation="reference", dt_softplus=False)(widened, None, cotangents)
    with interpret.interpreted():
        actual = runner(selective_scan, implementation="triton", dt_softplus=False)(narrow, None, cotangents)
    for name, x in actual.items():
        assert x.dtype == (jnp.bfloat16 if name == "y" or name[-3:] in ("BSE", "BSN") else jnp.float32), name
    compare(actual, expected, dtype="bfloat16")
    assert_close(actual["final"], expected["final"])  # states are fp32 throughout


@pytest.mark.parametrize(("tokens", "states"), [(5, 1), (3, 7), (3, 16), (3, 17), (3, 33)])
def test_it_equals_the_reference_with_other_numbers_of_states(tokens, states):
    arrays, segments, cotangents = problem(1, tokens, 6, states)
    expected = runner(selective_scan, implementation="reference")(arrays, segments, cotangents)
    with interpret.interpreted():
        compare(runner(selective_scan, implementation="triton")(arrays, segments, cotangents), expected)


@hypothesis.settings(max_examples=4, deadline=None, derandomize=True, database=None)
@hypothesis.given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 18), st.sampled_from([1, 6, 33]), st.integers(1, 5)),
    programs=st.sampled_from([2, 1024]),
    without=st.sets(st.sampled_from(OPTIONAL)),
    packed=st.sampled_from([True, False]),
    seed=st.integers(0, 99),
)
def test_it_equals_the_reference_at_any_shape(shape, programs, without, packed, seed):
    """Backward up to three segments, or few of several chunks, and dB and dC of two blocks of channels in one program."""
    arrays, segments, cotangents = problem(*shape, seed=seed, without=without)
    segments = segments if packed else None
    with pytest.MonkeyPatch.context() as patch, interpret.interpreted():
        patch.setattr(selective_scan_triton_cut, "BACKWARD_PROGRAMS", programs)
        actual = runner(selective_scan, implementation="triton")(arrays, segments, cotangents)
    compare(actual, runner(selective_scan, implementation="reference")(arrays, segments, cotangents))


def test_the_summaries_of_a_stretch():
    """Against those of the chunked implementation: rows with documents that start inside, and one without."""
    arrays, segments, (dy, _) = problem(2, 13, 6, 2, without=("initial_state_BEN",))
    segments[1] = 1
    inputs, spec = Inputs(**{name: jnp.asarray(x) for name, x in arrays.items()}, marks=marks(jnp.asarray(segments))), ScanSpec()
    compare_summaries(selective_scan_triton, chunked, inputs, spec, dy, inputs._replace(A_EN=inputs.A_EN * 1.001))


@pytest.mark.parametrize("gradient", [False, True])
def test_what_it_does_not_read_changes_no_bit(gradient, monkeypatch):
    """Steps so long that little of a segment is walked; walked whole, the same bits come out."""
    monkeypatch.setattr(selective_scan_triton_cut, "SHORTEST", 32)
    arrays, _, (dy, _) = problem(1, 32, 6, 2, without=("initial_state_BEN", "z_BSE"))
    arrays |= dict(dt_BSE=arrays["dt_BSE"] + 40, A_EN=arrays["A_EN"] - 0.5)
    inputs = Inputs(**{name: jnp.asarray(x) for name, x in arrays.items()})

    def found():
        cut = selective_scan_triton_cut.Cut(inputs, ScanSpec())
        with interpret.interpreted():
            return selective_scan_triton._segments(cut, *cut.forward_segments(), jnp.asarray(dy) if gradient else None)

    stopped = found()
    monkeypatch.setattr(selective_scan_triton_token, "FORGOTTEN", tl.constexpr(-1e30))
    whole = found()
    np.testing.assert_array_equal(stopped["stretch"], whole["stretch"])
    assert (2 * stopped["elapsed"] < whole["elapsed"])[..., :6].all()


def test_segments_that_are_forgotten_change_no_bit(monkeypatch):
    """Three segments of long steps. The twin: of short steps, and forgotten too early."""
    arrays, _, _ = problem(1, 24, 6, 2, without=("z_BSE",))
    long = arrays | dict(dt_BSE=arrays["dt_BSE"] + 40, A_EN=arrays["A_EN"] - 0.5)

    def found(arrays, forgotten):
        monkeypatch.setattr(selective_scan_triton_token, "FORGOTTEN", tl.constexpr(forgotten))
        with interpret.interpreted():
            return jax.jit(functools.partial(selective_scan, implementation="triton"))(**arrays)[1]

    np.testing.assert_array_equal(found(long, -150.0), found(long, -1e30))
    with pytest.raises(AssertionError):
        assert_close(found(arrays, -0.1), found(arrays, -150.0))


def test_over_devices_it_equals_the_whole(mesh_of):
    """Summaries, states passed between devices, and gradients, with every mesh axis manual."""
    arrays, segments, (dy, _) = problem(1, 16, 6, 2, without=("initial_state_BEN",))
    compare_over_devices(recurrences.selective_scan, arrays, segments, dy, mesh_of(), mesh_of(seq=4), "triton")


@triton.jit
def softplus_of(x, out, size: tl.constexpr):
    i = tl.arange(0, size)
    tl.store(out + i, softplus(tl.load(x + i)))


def test_steps_far_from_one():
    """The kernels' softplus against fp64, for steps from 1e-13 on; and of what is far from zero."""
    x = np.linspace(-30, 30, 4096, dtype=np.float32)
    x[:6] = -np.inf, -1e30, -200, 200, 1e30, np.inf
    with interpret.interpreted():
        found = launch(
            softplus_of, "softplus", grid=(1,), inputs=dict(x=jnp.asarray(x)), outputs=dict(out=x), constants=dict(size=4096)
        )
    np.testing.assert_array_equal(found["out"][:6], np.maximum(x[:6], 0))
    exact = np.logaddexp(0, x[6:].astype(np.float64))
    np.testing.assert_allclose(found["out"][6:], exact, rtol=3e-7)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(np.log1p(np.exp2(x[6:] * np.float32(np.log2(np.e)))), exact, rtol=3e-7)


# Where it runs.


def call(E=8, N=2, dtype=jnp.float32, **changed):
    shape = lambda *dims, dtype=dtype: jax.ShapeDtypeStruct(dims, dtype)
    arrays = dict(u_BSE=shape(1, 8, E), dt_BSE=shape(1, 8, E), A_EN=shape(E, N, dtype=jnp.float32))
    arrays |= dict(B_BSN=shape(1, 8, N), C_BSN=shape(1, 8, N), D_E=shape(E)) | changed
    return jax.eval_shape(functools.partial(selective_scan, implementation="triton"), **arrays)


def test_it_says_why_it_does_not_run_here(monkeypatch):
    with pytest.raises(UserError, match="'triton' cannot run on cpu: triton: it is for H100, H200, GH200 and this is cpu"):
        call()
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with interpret.interpreted(), pytest.raises(UserError, match="Triton needs TRITON_INTERPRET=1 in the environment"):
        call()


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (dict(N=65), "N=65 states a channel; it takes at most 64"),
        (dict(dtype=jnp.float16), "u_BSE has dtype float16; it takes bfloat16 and float32"),
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


def test_how_rows_are_cut(monkeypatch):
    """Programs enough for a large GPU; one segment where rows are short; dB and dC in few parts where rows are long."""
    monkeypatch.undo()
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32)

    def cut(B, S, E=2048, N=16):
        maps = shape(B, S, N)
        return selective_scan_triton_cut.Cut(
            Inputs(shape(B, S, E), shape(B, S, E), shape(E, N), maps, maps, shape(E)), ScanSpec()
        )

    assert cut(64, 512).forward_segments() == (1024, 1)
    assert cut(1, 2**20).forward_segments() == (2**14, 64)
    assert cut(1, 2**20).backward_segments() == (2**13, 128, 8)
    assert cut(1, 2**13).backward_segments() == (1024, 8, 1)
