"""The TPU kernels of attention beyond `test_attention_ops`: what they leave out, races, and that they compile for every TPU."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from lcx.ops.attention import attention
from lcx.ops.tiling import Tiling
from lcx.ops.types import AttentionSpec, Mask, Runs, Segments, contiguous
from lcx.ops.visibility import visible_BST
from lcx.parallel.layouts import local_runs
from lcx.planning.kernels import TPUS
from lcx.registry import UserError
from pallas_kernels import attention_tpu, attention_tpu_tile, interpret
from pallas_kernels.attention_ranges import Pairs
from tests.tolerance import assert_close

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="NOT CHECKED: compiling for TPUs needs pip install 'lcx[plan]' (libtpu)"
)


# Which tiles are computed.


def pairs(mask, q: Runs, k: Runs, segments=Segments(None, None), tile=512) -> Pairs:
    return Pairs(mask, Tiling.of(q, tile, 128), Tiling.of(k, tile, 128), segments)


def documents(length, cuts) -> Segments:
    ids = jnp.asarray(np.searchsorted(np.array(cuts), np.arange(length), side="right") + 1, jnp.int32)[None]
    return Segments(ids, ids)


LONG = 2**17
CUTS = (37_123, 90_001)
AREA = {
    "causal": (Mask(), Segments(None, None), LONG * (LONG + 1) // 2),
    "full": (Mask(causal=False), Segments(None, None), LONG**2),
    "window": (Mask(window=(2**15 - 1, 0)), Segments(None, None), 2**15 * LONG - 2**15 * (2**15 - 1) // 2),
    "packed": (Mask(), documents(LONG, CUTS), sum(n * (n + 1) // 2 for n in np.diff([0, *CUTS, LONG]).tolist())),
}


@pytest.mark.parametrize("name", AREA)
def test_executed_tiles_are_the_mask_area(name):
    """Within 3 %, forward and for either gradient, counted on the intervals that the kernels' loops run over."""
    mask, segments, area = AREA[name]
    whole = pairs(mask, contiguous(LONG), contiguous(LONG), segments)
    for ranges in (whole.over_keys(), whole.over_queries()):
        executed = int(ranges.tiles().sum()) * 512 * 512
        assert area <= executed <= 1.03 * area


@pytest.mark.parametrize("layout", ["zigzag", "striped", "contiguous"])
def test_executed_tiles_over_the_steps_of_a_ring(layout):
    """All steps of all devices together do the work of one device; in zigzag and striped order each does the same."""
    P, length = 4, 2**16
    work = np.zeros((P, P), np.int64)
    for device in range(P):
        for distance in range(P):
            q, k = (local_runs(layout, length, P, jnp.int32(place % P)) for place in (device, device - distance))
            work[device, distance] = int(pairs(Mask(), q, k, tile=256).over_keys().tiles().sum()) * 256 * 256
    area = length * (length + 1) // 2
    assert area <= work.sum() <= 1.03 * area
    by_device = work.sum(1)
    assert (by_device.max() / by_device.mean() <= 1.01) == (layout != "contiguous")


def inside(low, high) -> np.ndarray:
    """How often each of six tiles stands in the intervals (tiles, intervals) of every tile."""
    j = np.arange(6)
    return ((j >= low[..., None]) & (j < high[..., None])).sum(1)


def some_runs(rng, count: int) -> Runs:
    """48 tokens of a row of 192, in order."""
    length = 48 // count
    return Runs(jnp.asarray(np.sort(rng.choice(192 // length, count, replace=False) * length), jnp.int32), length)


def test_intervals_hold_every_visible_pair_and_nothing_else():
    """Against all pairs of tokens, for windows, sinks, documents and one to six runs a side, at tiles of 8 tokens."""
    rng = np.random.default_rng(0)
    for trial in range(40):
        causal, sinks = bool(rng.integers(2)), int(rng.integers(3)) * 3
        window = [None, (int(rng.integers(30)), 0), (int(rng.integers(20)), int(rng.integers(20)))][rng.integers(3)]
        mask = Mask(causal=causal, window=window, sink_tokens=sinks)
        order_q, order_k = (some_runs(rng, (1, 2, 3, 6)[trial % 4]) for _ in range(2))
        cuts = np.sort(rng.integers(0, 192, 4))
        row = np.where(np.arange(192) < 180, np.searchsorted(cuts, np.arange(192), side="right") + 1, 0)
        starts = np.concatenate([[0], cuts])
        leading = np.arange(192) - starts[np.searchsorted(cuts, np.arange(192), side="right")] < sinks
        at_q, at_k = np.asarray(order_q.order()), np.asarray(order_k.order())
        ids_q, ids_k = (jnp.asarray(row[at], jnp.int32)[None] for at in (at_q, at_k))
        sink = jnp.asarray(leading[at_k])[None] if sinks and window else None
        segments = Segments(ids_q, ids_k, sink)
        seen = np.asarray(visible_BST(mask, order_q.order(), order_k.order(), *segments))[0]
        tiles = seen.reshape(6, 8, 6, 8).swapaxes(1, 2)
        found = Pairs(mask, Tiling.of(order_q, 8, 8), Tiling.of(order_k, 8, 8), segments)
        for ranges, any_seen, all_seen in (
            (found.over_keys(), tiles.any((2, 3)), tiles.all((2, 3))),
            (found.over_queries(), tiles.any((2, 3)).T, tiles.all((2, 3)).T),
        ):
            low, high, full_low, full_high = (np.asarray(x)[0] for x in ranges)
            assert (inside(low, high) <= 1).all(), "no tile is computed twice"
            assert (inside(low, high) >= any_seen).all(), (trial, mask)
            assert (inside(full_low, full_high) <= all_seen).all(), (trial, mask)
            if not sinks:  # the hull of sink tiles may hold tiles between them
                assert (inside(low, high) == any_seen).mean() > 0.9


# Races.


def run_simulated(monkeypatch) -> tuple[bool, jax.Array, jax.Array]:
    """(whether the simulated chip saw a race in the last kernel, dq, expected dq) of a packed causal call of several tiles."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    monkeypatch.setattr(attention_tpu, "tile_sizes", lambda dtype: (128, 128))
    q, k, v = (
        jax.random.normal(key, (1, 256, heads, 64)) for key, heads in zip(jax.random.split(jax.random.key(0), 3), (2, 1, 1))
    )
    ids = jnp.asarray(np.searchsorted([100, 180], np.arange(256), side="right") + 1, jnp.int32)[None]

    def gradient(implementation):
        options = dict(mask=Mask(), segments_q_BS=ids, segments_k_BT=ids, implementation=implementation)
        return jax.grad(lambda *qkv: jnp.sin(attention(*qkv, **options)).sum(), argnums=(0, 1, 2))(q, k, v)[0]

    pltpu.reset_tpu_interpret_mode_state()
    # With a clock of few entries copies share one, and look ordered that are not.
    exact = pltpu.InterpretParams(detect_races=True, dma_execution_mode="eager", vector_clock_size=2048)
    with interpret.interpreted(exact):
        dq = gradient("mosaic_tpu").block_until_ready()
    return interpret_pallas_call.races.races_found, dq, gradient("chunked")


def test_no_race(monkeypatch):
    raced, dq, expected = run_simulated(monkeypatch)
    assert not raced
    assert_close(dq, expected, gradient=True)


@pytest.mark.parametrize("into_the_chip", [True, False])
def test_a_copy_that_is_not_waited_for_is_a_race(monkeypatch, into_the_chip):
    """The twin: a seeded bug is seen, in what comes and in what goes back."""
    right = pltpu.make_async_copy

    class Hasty:
        def __init__(self, copy):
            self.start, self.wait = copy.start, lambda: None

    def copy(source, to, semaphore):
        comes = "vmem" in str(jax.typeof(to.ref).memory_space)
        made = right(source, to, semaphore)
        return Hasty(made) if comes == into_the_chip else made

    monkeypatch.setattr(pltpu, "make_async_copy", copy)
    assert run_simulated(monkeypatch)[0]


def test_a_slot_that_is_filled_before_it_is_read_back_is_a_race(monkeypatch):
    """The twin: a visit's sums are still on their way back when those of the third visit after it come."""
    monkeypatch.setattr(attention_tpu_tile, "RETURNING", attention_tpu.RETURNING + 1)
    assert run_simulated(monkeypatch)[0]


# Where it runs.


def test_it_says_why_it_does_not_run_here():
    x = jnp.zeros((1, 8, 1, 64))
    with pytest.raises(
        UserError, match="'mosaic_tpu' cannot run on cpu: mosaic_tpu: it is for TPU v4, TPU v5, TPU v6 and this is cpu"
    ):
        attention(x, x, x, mask=Mask(), implementation="mosaic_tpu")


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [((1, 8, 1, 72), "float32", "head width K=72; it takes 64, 80, 96, 128, 256"), ((1, 8, 1, 64), "float16", "dtype float16")],
)
def test_what_it_refuses(shape, dtype, reason):
    x = jnp.zeros(shape, dtype)
    with interpret.interpreted(), pytest.raises(UserError, match=reason):
        attention(x, x, x, mask=Mask(), implementation="mosaic_tpu")


def test_a_mesh_that_is_left_to_the_compiler_is_refused(mesh_of):
    x = jnp.zeros((1, 8, 1, 64))
    with (
        interpret.interpreted(),
        jax.set_mesh(mesh_of(data=2)),
        pytest.raises(UserError, match="mesh axes data, fsdp, seq, tensor"),
    ):
        attention(x, x, x, mask=Mask(), implementation="mosaic_tpu")


# Ahead of time.


def compile_for(target: str, K: int, dtype: str, length: int = 1024, heads: tuple[int, int] = (2, 1)):
    """Forward and backward pass of one device of a target: packed, window, sinks, two traced runs a side, with a carry."""
    from lcx.planning.topologies import topology_mesh

    mesh = topology_mesh(TPUS[target], data=-1)
    device = mesh.devices.reshape(-1)[:1]
    sharding = jax.sharding.SingleDeviceSharding(device[0])
    shape = lambda *dims, dtype=dtype: jax.ShapeDtypeStruct(dims, jnp.dtype(dtype), sharding=sharding)
    spec = AttentionSpec(Mask(window=(600, 0), sink_tokens=4), K**-0.5)
    H, G = heads

    def passes(q, k, v, do, lse, ids, sink, starts):
        order = Runs(starts, length // 2)
        options = dict(spec=spec, order_q=order, order_k=order, segments=Segments(ids, ids, sink))
        o, total = attention_tpu.forward(q, k, v, **options, carry=(do.astype(jnp.float32), lse))
        return o, attention_tpu.backward(q, k, v, do, total, lse, **options)

    q, k, rows = shape(1, length, H, K), shape(1, length, G, K), shape(1, H, length, dtype="float32")
    others = shape(1, length, dtype="int32"), shape(1, length, dtype="bool"), shape(2, dtype="int32")
    with jax.sharding.use_abstract_mesh(jax.sharding.Mesh(device, ("x",)).abstract_mesh), jax.default_matmul_precision("default"):
        return jax.jit(passes).lower(q, k, k, q, rows, *others).compile()


# Every head width for one target and every target for one width; the rest of the product is for `make test-slow`.
COMPILED = [
    pytest.param(target, K, marks=[] if target == "v5e" or K == 128 else pytest.mark.slow)
    for target in TPUS
    for K in attention_tpu.HEAD_WIDTHS
]


@needs_libtpu
@pytest.mark.parametrize(("target", "K"), COMPILED)
def test_compiles_for_every_tpu(target, K):
    assert "lcx_attention_backward" in compile_for(target, K, "bfloat16").as_text()


@needs_libtpu
@pytest.mark.parametrize("K", [pytest.param(K, marks=[] if K == 128 else pytest.mark.slow) for K in attention_tpu.HEAD_WIDTHS])
def test_compiles_in_fp32(K):
    assert "lcx_attention_backward" in compile_for("v5e", K, "float32").as_text()


@needs_libtpu
@pytest.mark.slow
def test_compiles_at_a_million_tokens_and_more():
    """12 bytes a token; at four million two more for each pair of tiles, because sinks are looked for."""
    for n, of_pairs in ((2**20, 0), (2**22, 2 * (2**22 // 512) ** 2)):
        temporary = compile_for("v5p", 128, "bfloat16", n, heads=(1, 1)).memory_analysis().temp_size_in_bytes
        assert 0 < temporary - of_pairs <= 12 * n


@needs_libtpu
@pytest.mark.slow
def test_compiles_where_numbers_in_an_array_are_more_than_32_bits_count():
    """4,194,304 tokens and 8 heads of 128: 2^32 numbers in q, do and dq each, in what one chip of v5p has."""
    compiled = compile_for("v5p", 128, "bfloat16", 2**22, heads=(8, 2))
    assert "lcx_attention_backward" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes <= 2**35
