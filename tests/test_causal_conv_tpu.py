"""The TPU kernels of the convolution: interpreted against the reference, what they refuse, traffic, every TPU, bundles."""

import functools
import importlib.util

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lcx.ops.causal_conv import ConvSpec, Inputs, causal_conv
from lcx.ops.dispatch import recording
from lcx.parallel import recurrences
from lcx.planning.bundles import vmem_bytes
from lcx.planning.kernel_counts import compile_into, tpu_conv
from lcx.planning.kernels import TPUS, compile_causal_conv
from lcx.registry import UserError
from pallas_kernels import causal_conv_tpu, causal_conv_tpu_cut, interpret
from tests.launches import recorded
from tests.recurrences import breaks, compare, runner
from tests.test_causal_conv import OPTIONAL, problem, unequal
from tests.tolerance import assert_close

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="NOT CHECKED: compiling for TPUs needs pip install 'lcx[plan]' (libtpu)"
)
LANES, ROWS = causal_conv_tpu_cut.LANES, causal_conv_tpu_cut.ROWS


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    """Blocks of at most two parts of the tokens and two groups of channels, so that short rows have several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(causal_conv_tpu_cut, "CHANNELS", 2 * LANES)
        patch.setattr(causal_conv_tpu_cut, "BLOCK_BYTES", 2 * ROWS * 2 * LANES * 4)
        yield


# Interpreted.


def test_it_equals_the_reference():
    """Two rows, two blocks of channels, two of tokens, the last part of one of 44; documents, padding, everything optional."""
    arrays, segments, cotangents = problem(2, 300, 512, 4)
    segments = unequal(segments)
    cut = causal_conv_tpu_cut.Cut(Inputs(**{name: jnp.asarray(x) for name, x in arrays.items()}))
    assert cut.grid == (2, 2, 2) and cut.tokens // ROWS == 2
    expected = runner(causal_conv, implementation="reference", activation="silu")(arrays, segments, cotangents)
    run = runner(causal_conv, implementation="mosaic_tpu", activation="silu")
    with interpret.interpreted():
        compare(run(arrays, segments, cotangents), expected)
        breaks(run, arrays, segments, cotangents, expected)


def test_it_equals_the_reference_in_bf16_on_two_cores(monkeypatch):
    """One document a row and none given, blocks that are full, no activation; two cores share one row."""
    monkeypatch.setattr(causal_conv_tpu_cut, "device_kind", lambda: "TPU v5p")
    arrays, _, cotangents = problem(1, 8 * ROWS, 256, 4, without=OPTIONAL)
    narrow = arrays | dict(x_BSE=arrays["x_BSE"].astype(jnp.bfloat16))
    assert causal_conv_tpu_cut.Cut(Inputs(narrow["x_BSE"], arrays["w_EW"], None, None)).grid == (1, 2, 2)
    widened = {name: np.asarray(x, np.float32) for name, x in narrow.items()}
    expected = runner(causal_conv, implementation="reference")(widened, None, cotangents)
    run = runner(causal_conv, implementation="mosaic_tpu")
    with interpret.interpreted():
        actual = run(narrow, None, cotangents)
        assert {name for name, x in actual.items() if x.dtype == jnp.bfloat16} == {"y", "final", "dx_BSE"}
        compare(actual, expected, dtype="bfloat16")
        for changed in (dict(x_BSE=narrow["x_BSE"] * 1.125), dict(w_EW=arrays["w_EW"] * np.float32(1.125))):
            with pytest.raises(AssertionError):
                compare(run(narrow | changed, None, cotangents), expected, dtype="bfloat16")


def by_tanh(z):
    """What `_sigmoid` returns, as differences."""
    bent = jnp.tanh(z / 2)
    return (bent - 1) / 2, (-1 - bent) / 2


def test_channels_whose_activation_is_almost_0(monkeypatch):
    """Biases of -20 to 4, four channels at a time: of a whole array what is large would hide what is small."""
    arrays, segments, cotangents = problem(1, 2 * ROWS, LANES, 4)
    arrays |= dict(bias_E=np.linspace(-20, 4, LANES, dtype=np.float32), w_EW=arrays["w_EW"] / 2)

    def by_channels(implementation):
        def channels(x, dim):
            return np.split(np.asarray(x), LANES // 4, axis=dim)

        found = runner(causal_conv, implementation=implementation, activation="silu")(arrays, segments, cotangents)
        split = {name: channels(x, 0 if name in ("dw_EW", "dbias_E") else -1) for name, x in found.items()}
        return {f"{name}[{i}]": x for name, parts in split.items() for i, x in enumerate(parts)}

    expected = by_channels("reference")
    with interpret.interpreted():
        compare(by_channels("mosaic_tpu"), expected)
        # The twin: 1 - tanh.
        monkeypatch.setattr(causal_conv_tpu, "_sigmoid", by_tanh)
        wrong = by_channels("mosaic_tpu")
    for name in ("y[0]", "dx_BSE[0]", "dw_EW[0]", "dbias_E[0]"):
        with pytest.raises(AssertionError, match="RMS ratio"):
            assert_close(wrong[name], expected[name], gradient=name != "y[0]")


@functools.cache
def packed(implementation: str):
    """Compiled once: 3 blocks of one part."""
    run = runner(causal_conv, implementation=implementation, activation="silu")
    return lambda arrays, segments, cotangents: run(arrays, jnp.asarray(segments), cotangents)


@hypothesis.settings(max_examples=5, deadline=None, derandomize=True, database=None)
@hypothesis.given(
    documents=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 2 * ROWS)), min_size=1, max_size=6), seed=st.integers(0, 99)
)
def test_documents_of_any_length_and_order(documents, seed):
    """Ids that come again, padding anywhere, starts at and around the ends of parts and blocks; in another order in row 1."""
    S = 2 * ROWS + 9
    ids = np.concatenate([np.full(length, name, np.int32) for name, length in documents])
    segments = np.stack([np.resize(ids, S), np.resize(ids[::-1], S)])
    arrays, _, cotangents = problem(2, S, LANES, 3, seed=seed)
    expected = packed("reference")(arrays, segments, cotangents)
    with interpret.interpreted():
        compare(packed("mosaic_tpu")(arrays, segments, cotangents), expected)


@pytest.mark.parametrize(("tokens", "width"), [(2, 4), (5, 1), (7, 9), (ROWS + 1, 9)])
def test_rows_shorter_than_the_weights_and_other_widths(tokens, width):
    arrays, segments, cotangents = problem(1, tokens, LANES, width)
    segments = unequal(segments) if tokens > 2 else None
    expected = runner(causal_conv, implementation="reference", activation="silu")(arrays, segments, cotangents)
    with interpret.interpreted():
        compare(runner(causal_conv, implementation="mosaic_tpu", activation="silu")(arrays, segments, cotangents), expected)


def test_what_is_not_a_number_stays_in_its_document():
    """Padding is not multiplied by zero."""
    arrays, _, cotangents = problem(1, 2 * ROWS, LANES, 4)
    segments = np.repeat([[1, 0, 2]], [ROWS - 5, 10, ROWS - 5], axis=1).astype(np.int32)
    arrays["x_BSE"] = np.where((segments == 0)[..., None], np.float32(np.nan), arrays["x_BSE"])
    expected = runner(causal_conv, implementation="reference", activation="silu")(arrays, segments, cotangents)
    with interpret.interpreted():
        actual = runner(causal_conv, implementation="mosaic_tpu", activation="silu")(arrays, segments, cotangents)
    compare(actual, expected)


@pytest.mark.slow
def test_over_devices_it_equals_the_whole(mesh_of):
    """Rows handed from device to device, and gradients, with every mesh axis manual."""
    arrays, segments, (dy, _) = problem(1, 4 * ROWS, LANES, 4, without=("initial_BWE",))

    def results(arrays, mesh, implementation):
        options = dict(segments_BS=segments, activation="silu", implementation=implementation)
        y, pull = jax.vjp(lambda arrays: recurrences.causal_conv(**arrays, mesh=mesh, **options), arrays)
        return dict(y=y) | {f"d{name}": x for name, x in pull(jnp.asarray(dy))[0].items()}

    def on(mesh, implementation):
        with jax.set_mesh(mesh), interpret.interpreted():
            return jax.jit(functools.partial(results, mesh=mesh, implementation=implementation))(arrays)

    compare(on(mesh_of(seq=4), "mosaic_tpu"), on(mesh_of(), "reference"))


# Where it runs.


def call(E=LANES, W=4, dtype=jnp.float32):
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, dtype)
    return jax.eval_shape(functools.partial(causal_conv, implementation="mosaic_tpu"), shape(1, 8, E), shape(E, W))


def test_it_says_why_it_does_not_run_here():
    with pytest.raises(UserError, match="'mosaic_tpu' cannot run on cpu: mosaic_tpu: it is for TPU v4, TPU v5, TPU v6"):
        call()


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (dict(E=200), "E=200 channels; it takes multiples of 128, the nearest is 256"),
        (dict(W=10), "W=10 taps; it takes at most 9"),
        (dict(dtype=jnp.float16), "x_BSE has dtype float16; it takes bfloat16 and float32"),
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


@pytest.fixture
def whole_blocks(monkeypatch):
    """Blocks as they are on a device."""
    monkeypatch.setattr(causal_conv_tpu_cut, "CHANNELS", 1024)
    monkeypatch.setattr(causal_conv_tpu_cut, "BLOCK_BYTES", 2**21)


UNITS = {"lcx_causal_conv": 2, "lcx_causal_conv_backward": 3}


@needs_libtpu
@pytest.mark.parametrize(
    ("tokens", "plain", "beside"), [(2**22, True, 0.001), pytest.param(2**16, False, 0.04, marks=pytest.mark.slow)]
)
def test_what_moves(tokens, plain, beside, whole_blocks, monkeypatch):
    """Forward x and y, backward x, dy, dx, and 16 rows in front of every block of 1,024; a word a token and core. By the blocks
    that programs are handed; of XLA, which believes what a kernel says of itself, what it adds. Also of 2^32 numbers."""
    size = 2 * tokens * 1024
    with recorded(monkeypatch, causal_conv_tpu) as launches:
        programs = compile_causal_conv("v5p", tokens, 1024, plain=plain)
    assert [launch.name for launch in launches] == list(UNITS)
    for launch, program in zip(launches, programs, strict=True):
        moved = launch.bytes()
        whole = [moved.pop(name) for name in ("x", "y", "dy", "dx") if name in moved]
        assert whole == [size] * UNITS[launch.name]
        assert moved.pop("in_front", 0) <= 16 / 1024 * size
        assert moved.pop("words", 0) == (0 if plain else 2 * 4 * tokens)
        assert sum(moved.values()) < 2**18  # what does not grow with the tokens, and a number for 128 of them
        assert launch.declared == pytest.approx(sum(launch.bytes().values()), rel=0.01)
        assert program.cost_analysis()["bytes accessed"] - launch.declared < beside * size
        assert program.memory_analysis().temp_size_in_bytes < beside * size


def test_what_moves_is_counted_by_blocks(whole_blocks, monkeypatch):
    """The twin of the above: the block in front read whole, which no estimate says."""
    for module in (causal_conv_tpu, causal_conv_tpu_cut):
        monkeypatch.setattr(module, "COPIED", 1024)
    x = jax.ShapeDtypeStruct((1, 2**14, 1024), jnp.bfloat16)
    inputs = Inputs(x, *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1024, 4), (1024,), (1, 3, 1024))))
    with recorded(monkeypatch, causal_conv_tpu) as launches, interpret.interpreted():
        jax.eval_shape(functools.partial(causal_conv_tpu.backward, spec=ConvSpec(None)), inputs, x)
    assert launches[0].bytes()["in_front"] == 2 * 1024 * (2**14 - 1024)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("target", TPUS)
@pytest.mark.parametrize(("tokens", "channels", "dtype", "plain"), [(300, 384, "bfloat16", False), (4099, 2048, "float32", True)])
def test_compiles_for_every_tpu(target, tokens, channels, dtype, plain, whole_blocks):
    for program in compile_causal_conv(target, tokens, channels, dtype, plain=plain):
        assert "lcx_causal_conv" in program.as_text()


@needs_libtpu
@pytest.mark.slow
def test_over_a_row_that_is_spread_over_tpus(whole_blocks):
    """`auto` takes the kernels; nothing is gathered, rows and documents in front are handed on, and gradients back."""
    from lcx.planning.topologies import topology_mesh

    mesh = topology_mesh("v5p:2x2x1", seq=4)
    shape = lambda *dims, dtype, spec=PartitionSpec(None, "seq"): jax.ShapeDtypeStruct(
        dims, jnp.dtype(dtype), sharding=NamedSharding(mesh, spec)
    )
    x, segments = shape(1, 2**16, 2048, dtype="bfloat16"), shape(1, 2**16, dtype="int32")

    def loss(x, w, segments):
        y = recurrences.causal_conv(x, w, mesh=mesh, segments_BS=segments, activation="silu")
        return (y.astype(jnp.float32) ** 2).sum()

    with jax.set_mesh(mesh), recording(require=dict(causal_conv="mosaic_tpu")):
        gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))
        text = gradients.lower(x, shape(2048, 4, dtype="float32", spec=PartitionSpec()), segments).compile().as_text()
    assert "lcx_causal_conv_backward" in text and "all-gather" not in text
    assert text.count("collective-permute-start(") == 3


# Bundles, of a token and 1,024 channels, where no document starts and where one does; MiB of vector memory. Forward, backward.
COUNTS = {
    "v5e": dict(plain=(8.01, 15.4), asking=(12.9, 24.8), memory=(9.3, 14.2)),
    "v5p": dict(plain=(8.57, 15.8), asking=(13.2, 25.0), memory=(9.4, 14.3)),
    "v6e": dict(plain=(7.66, 14.2), asking=(12.2, 24.0), memory=(9.3, 14.2)),
    "v4": dict(plain=(16.2, 30.1), asking=(28.4, 52.0), memory=(5.0, 7.6)),
}


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("target", COUNTS)
def test_bundles(target, tmp_path):
    compile_into(tmp_path, "causal_conv", target)
    passes = tpu_conv(tmp_path, target).values()
    found = {what: [counts[what] for counts in passes] for what in ("plain", "asking")}
    found["memory"] = [vmem_bytes(tmp_path, kernel) / 2**20 for kernel in UNITS]
    for what, counts in COUNTS[target].items():
        for actual, expected in zip(found[what], counts, strict=True):
            assert actual == pytest.approx(expected, rel=0.03), (what, found)
