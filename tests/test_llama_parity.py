"""Logits and every parameter gradient equal Hugging Face's LlamaForCausalLM (fixtures: tests/fixtures/make_llama.py)."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcx.context import SequenceContext
from lcx.experiment import sizes_of
from lcx.mesh import make_mesh
from lcx.model import LossConfig
from lcx.pretrained import LLAMA, load_params, read_parameter
from lcx.registry import UserError
from lcx.sharding import parameter_shardings
from lcx.train_loop.state import plan_model
from tests.experiments import small
from tests.tolerance import assert_close, rms_ratio

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
HEADS = {
    "gqa_untied": dict(model__heads=4, model__kv_heads=2, model__tied=False),
    "mha_tied": dict(model__heads=2, model__kv_heads=2, model__tied=True),
}
LIMIT = 2e-6


def experiment_of(variant, **more):
    return small(sequence__length=24, model__vocab=96, ffns__gated__width=48, train__batch=2, **HEADS[variant], **more)


def load(variant, **more):
    e = experiment_of(variant, **more)
    plan = plan_model(e, sizes_of(e, 96))
    mesh = make_mesh(**e.mesh_sizes)
    return e, plan, mesh, load_params(str(FIXTURES / f"llama_{variant}"), e, plan, mesh)


class Gradients:
    """The fixture's gradients, read like a checkpoint."""

    def __init__(self, file):
        self.file = file

    def read(self, name, index):
        return self.file[f"grad/{name}"][index]


@pytest.mark.parametrize("variant", HEADS)
@pytest.mark.parametrize("mixer", ["full", "blockwise"])
def test_logits_and_gradients(variant, mixer):
    e, plan, mesh, params = load(variant, pattern=(mixer,))
    expected = np.load(FIXTURES / f"llama_{variant}.npz")
    tokens_BS = jnp.asarray(expected["tokens"])
    positions_BS = jnp.broadcast_to(jnp.arange(24, dtype=jnp.int32)[None], tokens_BS.shape)
    ctx = SequenceContext(positions_BS, None, "contiguous", mesh)
    labels_BS = jnp.concatenate([tokens_BS[:, 1:], jnp.zeros((2, 1), jnp.int32)], axis=1)
    weights_BS = (jnp.arange(24) < 23)[None] * jnp.ones((2, 1))

    def loss(params):
        model = nnx.merge(plan.graph, params)
        total, weight = model.loss(tokens_BS, labels_BS, weights_BS, ctx, objective=LossConfig())
        return total / weight, model.logits(tokens_BS, ctx)

    with jax.set_mesh(mesh):
        (value, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert rms_ratio(logits, expected["logits"]) < LIMIT
    assert abs(float(value) / float(expected["loss"]) - 1) < LIMIT
    truth = Gradients(expected)

    def compare(path, info, grad):
        names = [key.key for key in path]
        whole = lambda shape: tuple(slice(0, n) for n in shape)
        for layer in range(plan.sizes.L) if names[0] == "stacks" else (0,):
            ours = grad[layer] if names[0] == "stacks" else grad
            theirs = read_parameter(truth, LLAMA[names[-1]], layer, info.layer_dims, ours.shape, whole(ours.shape))
            assert_close(ours, theirs, name=f"{names} of layer {layer}", gradient=True)

    jax.tree_util.tree_map_with_path(compare, plan.infos, grads)


def test_the_gradient_check_can_fail():
    e, plan, _, params = load("gqa_untied")
    expected = np.load(FIXTURES / "llama_gqa_untied.npz")
    wrong = expected["grad/model.layers.0.self_attn.q_proj.weight"].T
    right = read_parameter(
        Gradients(expected), LLAMA["query_DHK"], 0, "DHK", (32, 4, 8), (slice(0, 32), slice(0, 4), slice(0, 8))
    )
    assert rms_ratio(wrong.reshape(32, 8, 4).swapaxes(1, 2), right) > 0.1


@pytest.mark.parametrize("variant", HEADS)
def test_sharded_load_equals_whole_load(variant):
    whole = load(variant)[3]
    e, plan, mesh, sharded = load(variant, mesh__fsdp=2, mesh__seq=2, mesh__tensor=2, pattern=("ring",))
    jax.tree.map(np.testing.assert_array_equal, whole, sharded)
    jax.tree.map(
        lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or pytest.fail(str(x.sharding)),
        sharded,
        parameter_shardings(plan.infos, mesh),
    )


def test_each_device_reads_its_slice_only(monkeypatch):
    from lcx import pretrained

    read = []
    original = pretrained.Tensors.read

    def counted(self, name, index):
        part = original(self, name, index)
        read.append((name, part.size))
        return part

    monkeypatch.setattr(pretrained.Tensors, "read", counted)
    load("gqa_untied", mesh__fsdp=2, mesh__tensor=2, pattern=("ring",))
    assert {size for name, size in read if "gate_proj" in name} == {48 * 32 // 4}


def test_another_model_is_refused_with_the_fields():
    e = small(model__layers=3, model__vocab=96, model__tied=True)
    plan, mesh = plan_model(e, sizes_of(e, 96)), make_mesh()
    with pytest.raises(UserError, match=r"model.layers=3 but num_hidden_layers=2; model.tied=True"):
        load_params(str(FIXTURES / "llama_gqa_untied"), e, plan, mesh)


def test_missing_directory_is_refused():
    e, plan, mesh, _ = load("gqa_untied")
    with pytest.raises(UserError, match=r"train.init_from='/nowhere'"):
        load_params("/nowhere", e, plan, mesh)
