"""Logits and every parameter gradient equal Hugging Face's MambaForCausalLM and Mamba2ForCausalLM (fixtures/make_mamba.py)."""

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
from lcx.train_loop.state import plan_model
from tests.experiments import small
from tests.tolerance import rms_ratio

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
LAYERS, LENGTH, VOCAB = 2, 21, 64
FIELDS = {
    "mamba": {"mixers.mamba.state": 8, "mixers.mamba.dt_rank": 3},
    "mamba2": {"mixers.mamba2.state": 16, "mixers.mamba2.head_dim": 16, "mixers.mamba2.groups": 2, "mixers.mamba2.chunk": 8},
}
LOGITS, GRADIENTS = 2e-6, 2e-6


def mamba(t, layer):
    """A layer's parameters of Mamba in our names, from `t(name in the layer)`."""
    E, N = t("mixer.A_log").shape
    R = t("mixer.dt_proj.weight").shape[1]
    inner, maps = t("mixer.in_proj.weight"), t("mixer.x_proj.weight")
    return dict(
        x_DE=inner[:E].T,
        z_DE=inner[E:].T,
        conv_EW=t("mixer.conv1d.weight")[:, 0],
        conv_E=t("mixer.conv1d.bias"),
        dt_ER=maps[:R].T,
        B_EN=maps[R : R + N].T,
        C_EN=maps[R + N :].T,
        dt_RE=t("mixer.dt_proj.weight").T,
        dt_bias_E=t("mixer.dt_proj.bias"),
        A_log_EN=t("mixer.A_log"),
        D_E=t("mixer.D"),
        out_ED=t("mixer.out_proj.weight").T,
    )


def mamba2(t, layer, G=2, N=16):
    """The same of Mamba-2."""
    E = t("mixer.norm.weight").shape[0]
    z, x, B, C, dt = np.split(t("mixer.in_proj.weight"), np.cumsum([E, E, G * N, G * N]))
    (wx, wB, wC), (bx, bB, bC) = (np.split(t(f"mixer.conv1d.{name}"), np.cumsum([E, G * N])) for name in ("weight", "bias"))
    return dict(
        z_DE=z.T,
        x_DE=x.T,
        B_DGN=B.T.reshape(-1, G, N),
        C_DGN=C.T.reshape(-1, G, N),
        dt_DH=dt.T,
        conv_x_EW=wx[:, 0],
        conv_x_E=bx,
        conv_B_GNW=wB[:, 0].reshape(G, N, -1),
        conv_B_GN=bB.reshape(G, N),
        conv_C_GNW=wC[:, 0].reshape(G, N, -1),
        conv_C_GN=bC.reshape(G, N),
        dt_bias_H=t("mixer.dt_bias"),
        A_log_H=t("mixer.A_log"),
        D_H=t("mixer.D"),
        norm_E=t("mixer.norm.weight"),
        out_ED=t("mixer.out_proj.weight").T,
    )


def parameters(variant: str, file, what: str):
    """The tree of our parameters, or of their gradients, from a fixture."""
    layers = []
    for i in range(LAYERS):
        read = lambda name, i=i: file[f"{what}/backbone.layers.{i}.{name}"]
        layers.append({"mixer": globals()[variant](read, i), "mixer_norm_D": read("norm.weight")})
    stacked = jax.tree.map(lambda *x: jnp.stack([jnp.asarray(y) for y in x]), *layers)
    whole = lambda name: jnp.asarray(file[f"{what}/{name}"])
    return {
        "embedding_VD": whole("backbone.embeddings.weight"),
        "head_DV": whole("lm_head.weight").T,
        "norm_D": whole("backbone.norm_f.weight"),
        "stacks": {0: stacked},
    }


def errors_of(variant: str, change=None, **fields) -> dict[str, float]:
    """RMS ratio of logits, loss and every gradient to the fixture's."""
    file = np.load(FIXTURES / f"{variant}.npz")
    shape = {"sequence.length": LENGTH, "model.vocab": VOCAB, "train.batch": 2, "ffn": "none", "pattern": (variant,)}
    e = small(**(shape | FIELDS[variant] | fields))
    plan, mesh = plan_model(e, sizes_of(e, VOCAB)), make_mesh(**e.mesh_sizes)
    params = parameters(variant, file, "weight")
    params = change(params) if change else params
    assert jax.tree.structure(params) == jax.tree.structure(plan.shapes)
    tokens_BS = jnp.asarray(file["tokens"])
    positions_BS = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32)[None], tokens_BS.shape)
    ctx = SequenceContext(positions_BS, None, "contiguous", mesh)
    labels_BS = jnp.roll(tokens_BS, -1, axis=1)
    weights_BS = jnp.broadcast_to((jnp.arange(LENGTH) < LENGTH - 1)[None], tokens_BS.shape)

    def loss(params):
        model = nnx.merge(plan.graph, params)
        total, weight = model.loss(tokens_BS, labels_BS, weights_BS, ctx, objective=LossConfig())
        return total / weight, model.logits(tokens_BS, ctx)

    with jax.set_mesh(mesh):
        (value, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    truth = parameters(variant, file, "grad")
    errors = jax.tree_util.tree_map_with_path(lambda path, a, b: (jax.tree_util.keystr(path), rms_ratio(a, b)), grads, truth)
    found = dict(jax.tree.leaves(errors, is_leaf=lambda x: isinstance(x, tuple)))
    return found | {"logits": rms_ratio(logits, file["logits"]), "loss": abs(float(value) / float(file["loss"]) - 1)}


@pytest.mark.parametrize("variant", FIELDS)
def test_logits_and_gradients(variant):
    errors = errors_of(variant)
    over = {name: x for name, x in errors.items() if x > (LOGITS if name in ("logits", "loss") else GRADIENTS)}
    assert not over, over


@pytest.mark.parametrize("variant", FIELDS)
def test_a_changed_rate_is_noticed(variant):
    """The twin: one parameter of 2 layers, a hundredth larger."""

    def change(params):
        mixer = params["stacks"][0]["mixer"]
        name = "A_log_EN" if "A_log_EN" in mixer else "A_log_H"
        return params | {"stacks": {0: params["stacks"][0] | {"mixer": mixer | {name: mixer[name] + 1e-2}}}}

    assert errors_of(variant, change)["logits"] > 10 * LOGITS
