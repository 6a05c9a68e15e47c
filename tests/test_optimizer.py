"""Optimizers see the layers of the unrolled model, go by logical dimensions, and keep their moments beside the parameters."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lcx import registry
from lcx.experiment import sizes_of
from lcx.mesh import make_mesh
from lcx.mixers import MIXERS
from lcx.registry import UserError
from lcx.sharding import ParameterInfo, parameter_shardings
from lcx.train_loop import optimizer as optimizers
from lcx.train_loop.optimizer import Config, build, clip, decayed, label, learning_rate, muon_dimensions
from lcx.train_loop.state import init_params, init_state, plan_model, state_shardings
from tests.experiments import small
from tests.tolerance import GRADIENTS, assert_close, rms_ratio

LAYERS, STEPS = 2, 2
# Wide enough (128 and more) for adafactor to factor its second moments.
LAYER_SHAPES = {
    "up_DF": (128, 136),
    "query_DHK": (128, 4, 40),
    "out_HKD": (4, 40, 128),
    "state_EN": (136, 8),  # marked as not decayed, like the A of a state-space model
    "norm_D": (128,),
}
MODEL_SHAPES = {"embedding_VD": (144, 128), "head_DV": (128, 144), "last_norm_D": (128,)}


def dims(name: str) -> str:
    return name.rpartition("_")[2]


def info(name: str, stacked: bool) -> ParameterInfo:
    return ParameterInfo(("L" if stacked else "") + dims(name), decay=name != "state_EN")


def random(seed: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    """Parameters or gradients of the stacked model, layers of different sizes."""
    rng = np.random.default_rng(seed)
    layers = {
        name: np.stack([(3.0**layer) * rng.normal(size=shape) for layer in range(LAYERS)]) for name, shape in LAYER_SHAPES.items()
    }
    rest = {name: rng.normal(size=shape) for name, shape in MODEL_SHAPES.items()}
    return {name: jnp.asarray(scale * x, jnp.float32) for name, x in (layers | rest).items()}


STACKED = {name: info(name, True) for name in LAYER_SHAPES} | {name: info(name, False) for name in MODEL_SHAPES}
UNROLLED = {f"{layer}.{name}": info(name, False) for name in LAYER_SHAPES for layer in range(LAYERS)}
UNROLLED |= {name: info(name, False) for name in MODEL_SHAPES}


def unroll(tree):
    found = {f"{layer}.{name}": tree[name][layer] for name in LAYER_SHAPES for layer in range(LAYERS)}
    return found | {name: tree[name] for name in MODEL_SHAPES}


def last_update(transformation, params, gradients):
    """The update of the last of some steps."""

    update, state = jax.jit(transformation.update), transformation.init(params)
    for grads in gradients:
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return updates


@functools.cache
def stacked_update(name: str):
    transformation = build(Config(name=name, warmup_steps=1, learning_rate=1e-2), 10, STACKED)
    return last_update(transformation, random(0, 0.1), [random(1 + step, 1e-2) for step in range(STEPS)])


@functools.cache
def unrolled_update(name: str):
    transformation = build(Config(name=name, warmup_steps=1, learning_rate=1e-2), 10, UNROLLED)
    return last_update(transformation, unroll(random(0, 0.1)), [unroll(random(1 + step, 1e-2)) for step in range(STEPS)])


# ---- stacked layers are the layers of the unrolled model


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_stacked_layers_are_updated_as_if_each_were_alone(name):
    ours, expected = unroll(stacked_update(name)), unrolled_update(name)
    for parameter in expected:
        assert_close(ours[parameter], expected[parameter], name=parameter, gradient=True)


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_the_stacked_check_can_fail(name):
    """Taken for a dimension of the weight, the layers change what these two do."""
    parameter = "up_DF"
    transformation = build(Config(name=name, warmup_steps=1, learning_rate=1e-2), 10, {parameter: ParameterInfo("NDF", True)})
    only = lambda tree: {parameter: tree[parameter]}
    ours = last_update(transformation, only(random(0, 0.1)), [only(random(1 + step, 1e-2)) for step in range(STEPS)])
    assert rms_ratio(ours[parameter][0], unrolled_update(name)[f"0.{parameter}"]) > 100 * GRADIENTS["float32"]


# ---- rules by logical dimensions


def test_labels_of_a_real_model():
    e = small(**{"mixers.ring.qk_norm": True, "mixers.ring.sink_logits": True})
    plan, found = plan_model(e, sizes_of(e, 64)), {}
    jax.tree_util.tree_map_with_path(lambda path, info: found.setdefault(label(info), set()).add(path[-1].key), plan.infos)
    assert found["table"] == {"embedding_VD", "head_DV"}
    assert found["vector"] == {"norm_D", "mixer_norm_D", "ffn_norm_D", "query_norm_K", "key_norm_K", "sink_H"}
    assert found["matrix"] == {"query_DHK", "key_DGK", "value_DGK", "out_HKD", "gate_DF", "up_DF", "down_FD"}


@pytest.mark.parametrize("prefix", ["", "L"])
@pytest.mark.parametrize(
    "letters,kind,rows,columns",
    [
        ("DF", "matrix", "D", "F"),
        ("FD", "matrix", "F", "D"),
        ("DHK", "matrix", "D", "HK"),
        ("HKD", "matrix", "HK", "D"),
        ("EN", "matrix", "E", "N"),
        ("VD", "table", None, None),
        ("DV", "table", None, None),
        ("D", "vector", None, None),
        ("H", "vector", None, None),
    ],
)
def test_muon_takes_matrices_by_their_letters(prefix, letters, kind, rows, columns):
    parameter = ParameterInfo(prefix + letters, True)
    assert label(parameter) == kind
    found = muon_dimensions(parameter)
    if kind != "matrix":
        assert found is None
        return
    as_letters = lambda entry: "".join(parameter.dims[i] for i in np.atleast_1d(entry))
    assert (as_letters(found.reduction_axis), as_letters(found.output_axis)) == (rows, columns)


def test_muon_turns_each_layer_into_a_nearly_orthogonal_matrix():
    config = Config(name="muon", warmup_steps=0, schedule="constant", learning_rate=1.0, weight_decay=0.0)
    only = lambda tree: {name: tree[name] for name in ("up_DF", "query_DHK", "out_HKD")}
    updates = last_update(build(config, 10, only(STACKED)), only(random(0, 0.1)), [only(random(1))])
    for name, update in updates.items():
        rows = 4 * 40 if name == "out_HKD" else 128
        for layer in range(LAYERS):
            matrix = np.asarray(update[layer]).reshape(rows, -1)
            singular = np.linalg.svd(matrix, compute_uv=False) / (0.2 * math.sqrt(max(matrix.shape)))
            assert 0.5 < singular.min() and singular.max() < 1.4, (name, layer)


def test_muon_leaves_tables_and_vectors_to_adamw_without_decay():
    config = Config(warmup_steps=1, learning_rate=1e-2)
    adamw = optax.adamw(learning_rate(config, 10), config.beta1, config.beta2, config.eps, weight_decay=0.0, nesterov=True)
    only = lambda tree: {name: tree[name] for name in ("embedding_VD", "head_DV", "norm_D", "last_norm_D")}
    expected = last_update(adamw, only(random(0, 0.1)), [only(random(1 + step, 1e-2)) for step in range(STEPS)])
    for name in expected:
        assert_close(stacked_update("muon")[name], expected[name], name=name)


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_decay_touches_matrices_alone_and_not_those_that_are_exempt(name):
    """Without gradients, all that moves a parameter is its decay."""
    config = Config(name=name, warmup_steps=0, schedule="constant", learning_rate=1e-2, weight_decay=0.5)
    params = random(0)
    updates = last_update(build(config, 10, STACKED), params, [jax.tree.map(jnp.zeros_like, params)])
    tables_decay = name != "muon"  # which leaves them to adamw without decay
    for parameter in params:
        if parameter in ("norm_D", "last_norm_D", "state_EN") or (label(STACKED[parameter]) == "table" and not tables_decay):
            assert not np.asarray(updates[parameter]).any(), parameter
        else:
            assert_close(updates[parameter], -1e-2 * 0.5 * params[parameter], name=parameter)


def test_decay_goes_by_letters_and_marks():
    assert decayed(ParameterInfo("LDF", True)) and decayed(ParameterInfo("VD", True))
    assert not decayed(ParameterInfo("LD", True)) and not decayed(ParameterInfo("LEN", False))


# ---- learning rate


def rates(steps: int, **fields) -> np.ndarray:
    rate = learning_rate(Config(learning_rate=2.0, **fields), steps)
    return np.array([float(rate(step)) for step in range(steps + 1)])


@pytest.mark.parametrize("schedule", optimizers.SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 4, 20])
def test_a_schedule_starts_above_zero_and_reaches_its_peak_when_the_warm_up_ends(schedule, warmup):
    found = rates(20, schedule=schedule, warmup_steps=warmup)
    assert found[0] > 0
    np.testing.assert_allclose(found[max(warmup, 1) - 1], 2.0, rtol=1e-6)
    np.testing.assert_allclose(np.diff(found[:warmup]), 2.0 / max(warmup, 1), rtol=1e-4)
    assert found.max() <= 2.0 * (1 + 1e-6)


@pytest.mark.parametrize("schedule,final", [("cosine", 0.5), ("wsd", 0.5), ("constant", 2.0)])
def test_a_schedule_ends_where_it_says(schedule, final):
    assert abs(rates(20, schedule=schedule, warmup_steps=4, final_fraction=0.25)[-1] - final) < 1e-6


def test_the_shapes_of_the_schedules():
    cosine = rates(20, schedule="cosine", warmup_steps=4, final_fraction=0.0)[4:]
    np.testing.assert_allclose(cosine, 1 + np.cos(np.pi * np.arange(17) / 16), atol=1e-6)
    wsd = rates(24, schedule="wsd", warmup_steps=4, decay_fraction=0.25, final_fraction=0.0)
    np.testing.assert_allclose(wsd[4:20], 2.0)
    np.testing.assert_allclose(wsd[19:], 2.0 * np.array([5, 4, 3, 2, 1, 0]) / 5, atol=1e-6)
    np.testing.assert_allclose(rates(20, schedule="constant", warmup_steps=4)[4:], 2.0)


def test_a_warm_up_longer_than_the_run_still_reaches_the_peak():
    np.testing.assert_allclose(rates(10, warmup_steps=100)[9], 2.0, rtol=1e-6)


# ---- clipping, names


@pytest.mark.parametrize("limit,factor", [(0.0, 1.0), (10.0, 1.0), (5.0, 1.0), (1.0, 0.2)])
def test_clipping_scales_down_to_the_limit_and_never_up(limit, factor):
    grads = {"a": jnp.array([3.0]), "b": jnp.array([[4.0]])}
    clipped = clip(grads, optax.tree.norm(grads), limit)
    for name in grads:
        np.testing.assert_allclose(clipped[name], factor * grads[name], rtol=1e-6)


def test_clipping_of_zero_gradients_stays_finite():
    assert float(clip({"a": jnp.zeros(2)}, jnp.float32(0), 1.0)["a"].sum()) == 0.0


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(UserError, match="optimizer.name='adamww' is not known; did you mean 'adamw'"):
        build(Config(name="adamww"), 10, STACKED)
    with pytest.raises(UserError, match="optimizer.schedule='linear' is not known"):
        learning_rate(Config(schedule="linear"), 10)


# ---- where the moments live


@pytest.fixture(scope="module")
def planned():
    e = small(mesh__fsdp=2, mesh__seq=2, mesh__tensor=2, train__batch=2)
    return e, plan_model(e, sizes_of(e, 64)), make_mesh(**e.mesh_sizes)


def names_of(path) -> list[str]:
    return [key.key for key in path if isinstance(key, jax.tree_util.DictKey) and isinstance(key.key, str)]


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_moments_live_beside_their_parameters_and_scalars_everywhere(planned, name):
    e, plan, mesh = planned
    transformation = build(Config(name=name), 10, plan.infos)
    shardings = state_shardings(transformation, plan, mesh)
    assert jax.tree.leaves(shardings.params) == jax.tree.leaves(parameter_shardings(plan.infos, mesh))

    params, places = {}, parameter_shardings(plan.infos, mesh)
    jax.tree_util.tree_map_with_path(lambda path, shape, place: params.update({path: (shape.shape, place)}), plan.shapes, places)
    by_name = {path[-1].key: entry for path, entry in params.items()}
    with jax.set_mesh(mesh):
        state = init_state(init_params(e, plan, mesh), transformation, shardings)
    beside = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.optimizer):
        owner = [n for n in names_of(path) if n in by_name]
        if owner and leaf.shape == by_name[owner[-1]][0]:
            assert leaf.sharding.is_equivalent_to(by_name[owner[-1]][1], leaf.ndim), (path, leaf.sharding)
            beside.add(owner[-1])
        else:
            assert leaf.size < 64 and leaf.sharding.is_fully_replicated, (path, leaf.shape, leaf.sharding)
    assert beside == set(by_name)
    assert any(not place.is_fully_replicated for _, place in by_name.values())


@pytest.mark.parametrize("mixer", MIXERS)
def test_biases_and_rates_of_every_mixer_are_no_matrices_and_not_decayed(mixer):
    """By name: what ends in one letter, the biases of convolutions and the rates of decay."""
    part = registry.load(MIXERS, mixer, field="mixer").tiny()
    fields = {f"mixers.{mixer}.{name}": value for name, value in part.items()}
    e = small(pattern=(mixer,), **fields)
    infos = jax.tree_util.tree_leaves_with_path(plan_model(e, sizes_of(e, 64)).infos)
    plain = lambda name: len(name.rpartition("_")[2]) == 1 or name.startswith("A_log") or name in ("conv_B_GN", "conv_C_GN")
    for path, info in infos:
        name = path[-1].key
        if plain(name):
            assert label(info) == "vector" and not decayed(info), name
        assert muon_dimensions(info) is None or not plain(name)
