"""Loss and gradients of the whole model are the same over every mesh, layout, mixer, chunk and remat policy."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcx.experiment import sizes_of
from lcx.mesh import make_mesh
from lcx.sharding import parameter_shardings
from lcx.train_loop.state import plan_model
from lcx.train_loop.step import context, in_stream_layout
from tests.experiments import small
from tests.tolerance import GRADIENTS, assert_close, assert_trees_close, rms_ratio

LENGTH, BATCH = 64, 2
SIZES = dict(model__kv_heads=2, train__batch=BATCH, sequence__length=LENGTH)


@functools.cache
def batch(packed: bool) -> dict[str, np.ndarray]:
    """Two rows; packed ones hold documents of uneven lengths and different amounts of padding."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 61, (BATCH, LENGTH)).astype(np.int32)
    lengths = ((20, 13, 25), (7, 30)) if packed else ((LENGTH,), (LENGTH,))
    segments, positions = np.zeros((BATCH, LENGTH), np.int32), np.zeros((BATCH, LENGTH), np.int32)
    weights = np.zeros((BATCH, LENGTH), np.float32)
    for row, pieces in enumerate(lengths):
        at = 0
        for number, length in enumerate(pieces, 1):
            segments[row, at : at + length], positions[row, at : at + length] = number, np.arange(length)
            weights[row, at : at + length - 1] = 1.0
            at += length
    return dict(
        tokens_BS=tokens, labels_BS=np.roll(tokens, -1, 1), weights_BS=weights, segments_BS=segments, positions_BS=positions
    )


@functools.cache
def parameters(shapes: tuple) -> list[np.ndarray]:
    """Numbers for parameters of these shapes, drawn once: the loss is to be compared, not the initialisation."""
    rng = np.random.default_rng(1)
    return [(0.2 * rng.standard_normal(shape)).astype(np.float32) for shape in shapes]


PROGRAMS: dict[str, Callable] = {}


def program(overrides: dict):
    """batch -> mean loss and gradients of a model, compiled once."""
    key = repr(sorted(overrides.items()))
    if key not in PROGRAMS:
        e = small(**(SIZES | overrides))
        plan, mesh = plan_model(e, sizes_of(e, 64)), make_mesh(**e.mesh_sizes)

        def loss(params, arrays):
            placed = in_stream_layout(arrays, e, mesh)
            model = nnx.merge(plan.graph, params)
            ctx = context(placed, e, mesh)
            total, weight = model.loss(placed["tokens_BS"], placed["labels_BS"], placed["weights_BS"], ctx, objective=e.loss)
            return total / weight

        run = jax.jit(jax.value_and_grad(loss))

        def both(arrays):
            with jax.set_mesh(mesh):
                leaves, tree = jax.tree.flatten(plan.shapes)
                params = jax.tree.unflatten(tree, parameters(tuple(leaf.shape for leaf in leaves)))
                value, grads = run(jax.device_put(params, parameter_shardings(plan.infos, mesh)), arrays)
                return float(value), jax.tree.map(np.asarray, grads)

        PROGRAMS[key] = both
    return PROGRAMS[key]


def loss_and_gradients(packed: bool = False, change=None, **overrides):
    """Mean loss and gradients of the parameters that `parameters` gives. Models that differ in data alone share a program."""
    arrays = {name: jnp.asarray(x) for name, x in batch(packed).items()}
    return program(overrides)(change(arrays) if change else arrays)


@functools.cache
def truth(packed: bool, **overrides):
    return loss_and_gradients(packed, pattern=("full",), **overrides)


MESHES = [
    dict(mesh__seq=8),
    dict(mesh__data=2, mesh__seq=4),
    dict(mesh__fsdp=2, mesh__seq=2, mesh__tensor=2),
    dict(mesh__seq=1, mesh__tensor=2),
]
NAME = lambda fields: "-".join(f"{k.split('__')[-1]}{v}" for k, v in fields.items()) if isinstance(fields, dict) else str(fields)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "whole"])
@pytest.mark.parametrize("mesh", MESHES, ids=NAME)
def test_every_mesh_gives_the_same_loss_and_gradients(mesh, packed):
    value, grads = loss_and_gradients(packed, pattern=("ring",), **mesh)
    expected, expected_grads = truth(packed)
    assert_close(value, expected, name="loss")
    assert_trees_close(grads, expected_grads, gradient=True)


# Every layout of every strategy is checked on the operation and on the mixer (contracts/); here each layout and mixer once.
@pytest.mark.parametrize(
    "mixer,layout", [("ring", "striped"), ("ulysses", "contiguous"), ("ulysses_ring", "zigzag"), ("allgather", "striped")]
)
def test_every_strategy_and_layout_gives_the_same_loss_and_gradients(mixer, layout):
    value, grads = loss_and_gradients(True, pattern=(mixer,), mesh__seq=4, sequence__layout=layout)
    expected, expected_grads = truth(True)
    assert_close(value, expected, name="loss")
    assert_trees_close(grads, expected_grads, gradient=True)


@pytest.mark.parametrize(
    "block",
    [
        dict(block__token_chunk=24, block__remat="minimal", loss__chunk=24),
        dict(block__token_chunk=0, block__remat="none"),
        dict(block__token_chunk=16, block__fuse_attention=True),
        dict(block__token_chunk=24, block__fuse_attention=True, block__remat="minimal"),
    ],
    ids=NAME,
)
def test_chunks_fusion_and_remat_change_nothing(block):
    """Mini-Sequence and Blockwise Parallel Transformer equal the plain layer, also for chunks that do not divide."""
    value, grads = loss_and_gradients(True, pattern=("blockwise",), **block)
    expected, expected_grads = truth(True)
    assert_close(value, expected, name="loss")
    assert_trees_close(grads, expected_grads, gradient=True)


def test_fused_attention_over_batch_and_tensor_shards():
    mesh = dict(mesh__fsdp=2, mesh__seq=1, mesh__tensor=2)
    value, grads = loss_and_gradients(True, pattern=("blockwise",), block__token_chunk=16, block__fuse_attention=True, **mesh)
    expected, expected_grads = truth(True)
    assert_close(value, expected, name="loss")
    assert_trees_close(grads, expected_grads, gradient=True)


def test_layers_beyond_whole_groups_of_the_pattern():
    """Three layers of a pattern of two: one group in the scan and one layer after it."""
    kinds = dict(layers={"near": dict(mixer="ring", window=8), "far": dict(mixer="ring")}, model__layers=3)
    value, grads = loss_and_gradients(True, pattern=("near", "far"), mesh__seq=4, **kinds)
    kinds["layers"] = {name: fields | {"mixer": "full"} for name, fields in kinds["layers"].items()}
    expected, expected_grads = loss_and_gradients(True, pattern=("near", "far"), **kinds)
    assert_close(value, expected, name="loss")
    assert_trees_close(grads, expected_grads, gradient=True)


FEATURES = {
    "tied, qk_norm, losses": {
        "model.tied": True,
        "mixers.{m}.qk_norm": True,
        "loss.z_loss": 1e-3,
        "loss.label_smoothing": 0.1,
    },
    "sinks, softcap": {
        "mixers.{m}.sink_logits": True,
        "mixers.{m}.window": (7, 0),
        "mixers.{m}.sink_tokens": 2,
        "mixers.{m}.softcap": 5.0,
        "model.logit_softcap": 8.0,
    },
    "bidirectional, alibi": {"mixers.{m}.causal": False, "posenc": "alibi"},
}


@pytest.mark.parametrize("feature", FEATURES)
def test_features_are_the_same_sharded(feature):
    fields = lambda m: {key.format(m=m): value for key, value in FEATURES[feature].items()}
    value, grads = loss_and_gradients(True, pattern=("ring",), mesh__seq=2, mesh__tensor=2, **fields("ring"))
    expected, expected_grads = loss_and_gradients(True, pattern=("full",), **fields("full"))
    assert_close(value, expected, name="loss")
    assert_trees_close(grads, expected_grads, gradient=True)


def test_a_leaked_document_would_be_seen():
    """The twin: joining the first two documents of a row changes loss and gradients far beyond the tolerance."""
    join = lambda arrays: arrays | {"segments_BS": jnp.maximum(arrays["segments_BS"] - 1, jnp.minimum(arrays["segments_BS"], 1))}
    value, grads = loss_and_gradients(True, change=join, pattern=("ring",), **MESHES[0])
    expected, expected_grads = truth(True)
    assert abs(value / expected - 1) > 1e-5
    query = lambda g: g["stacks"][0]["mixer"]["query_DHK"]
    assert rms_ratio(query(grads), query(expected_grads)) > 100 * GRADIENTS["float32"]


@pytest.mark.parametrize(
    "fields",
    [
        dict(pattern=("ring",), mesh__seq=8),
        dict(pattern=("ring",), mesh__fsdp=2, mesh__seq=2, mesh__tensor=2),
        dict(pattern=("blockwise",), block__token_chunk=16, block__fuse_attention=True),
    ],
    ids=["seq8", "fsdp2-seq2-tensor2", "fused"],
)
def test_bfloat16_stays_near_the_fp32_truth_on_every_mesh(fields):
    """Activations round to eight bits; what is summed over chunks and devices does not, so no mesh is worse than one device."""
    value, grads = loss_and_gradients(True, model__dtype="bfloat16", **fields)
    expected, expected_grads = truth(True)
    assert_close(value, expected, name="loss", dtype="bfloat16")
    assert_trees_close(grads, expected_grads, gradient=True, dtype="bfloat16")


HYBRID = dict(pattern=("mamba", "local", "wide"), model__layers=3, mixers__mamba__state=4)
HYBRID |= dict(layers={"local": dict(mixer="ring", window=8), "wide": dict(mixer="ring")})


def test_a_hybrid_is_the_same_sharded_and_converts_where_layouts_meet():
    """Recurrences and a windowed ring in contiguous order, full attention in zigzag order between them."""
    e = small(**(SIZES | HYBRID | dict(mesh__seq=4)))
    assert e.layout == "contiguous" and [kind.layout_in(e.layout) for kind in e.pattern].count("zigzag") == 1
    value, grads = loss_and_gradients(True, mesh__seq=4, **HYBRID)
    expected, expected_grads = loss_and_gradients(True, **HYBRID)
    assert_close(value, expected, name="loss")
    assert_trees_close(grads, expected_grads, gradient=True)


def pad_the_end(arrays):
    """The last nine tokens of every row are padding."""
    keep = jnp.arange(LENGTH)[None] < LENGTH - 9
    return arrays | {name: arrays[name] * keep for name in ("segments_BS", "weights_BS", "positions_BS")}


@pytest.mark.parametrize("mixer,whole", [("ring", "full"), ("mamba", "mamba")])
def test_rows_of_one_document_need_no_ids(mixer, whole):
    """packing=stream leaves them out; loss and gradients are those of one device with them, padding at the end included."""
    value, grads = loss_and_gradients(data__packing="stream", pattern=(mixer,), mesh__seq=4, change=pad_the_end)
    expected, expected_grads = loss_and_gradients(pattern=(whole,), change=pad_the_end)
    assert_close(value, expected, name="loss")
    assert_trees_close(grads, expected_grads, gradient=True)


def test_only_causal_rows_of_one_document_go_without_ids():
    ids = lambda **fields: context(batch(False), small(**fields), make_mesh()).segments_BS
    assert ids(data__packing="stream", pattern=("blockwise",)) is None
    assert ids(data__packing="concat", pattern=("blockwise",)) is not None
    assert ids(data__packing="stream", pattern=("blockwise",), mixers__blockwise__causal=False) is not None
