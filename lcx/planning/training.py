"""What a training run, or one of its layers, will need: compiled for a mesh that need not be here."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from lcx.context import SequenceContext
from lcx.data.loader import BATCH_SPEC
from lcx.data.rows import DTYPES
from lcx.experiment import Experiment, sizes_of
from lcx.planning.memory import compiled_bytes
from lcx.registry import UserError
from lcx.train_loop import optimizer as optimizers
from lcx.train_loop.fitting import compile_fitting
from lcx.train_loop.state import plan_model


def compile_for(experiment: Experiment, mesh: Mesh) -> jax.stages.Compiled:
    """The whole train step of a run on text, compiled for a mesh; no data is looked at, nothing is allocated or run.

    Args:
      experiment: resolved for as many devices as the mesh has.
      mesh: of devices that are here, or of `lcx.planning.topologies`.

    Raises:
      UserError: `model.vocab` is not stated, or does not divide over `tensor`; or the compiler finds too little memory.
    """
    if experiment.model.vocab is None:
        raise UserError("model.vocab=None: state the vocabulary to plan a run without its data")
    sizes = sizes_of(experiment, experiment.model.vocab)
    optimizer = optimizers.build(experiment.optimizer, experiment.train.steps, plan_model(experiment, sizes).infos)
    shape, home = (experiment.train.batch, experiment.sequence.length), NamedSharding(mesh, BATCH_SPEC)
    batch = {f"{name}_BS": jax.ShapeDtypeStruct(shape, dtype, sharding=home) for name, dtype in DTYPES.items()}
    with jax.set_mesh(mesh):
        return compile_fitting(experiment, sizes, optimizer, mesh, batch).step


def train_step_memory(experiment: Experiment, mesh: Mesh) -> dict[str, int]:
    """`compiled_bytes` of the whole train step; see `compile_for`."""
    return compiled_bytes(compile_for(experiment, mesh))


def compile_layer(experiment: Experiment, mesh: Mesh) -> jax.stages.Compiled:
    """The forward and backward pass of the first layer, batch 1, without embedding and head; nothing is allocated or run.

    Args:
      experiment: with the layer's parts, sizes, sequence length and block options.
      mesh: devices of the kind to compile for.
    """
    plan = plan_model(experiment, experiment.model.sizes(vocab=256))
    length, layout = experiment.sequence.length, experiment.layout
    x_BSD = jax.ShapeDtypeStruct((1, length, plan.sizes.D), jnp.dtype(experiment.model.dtype))

    def loss(params, x_BSD):
        layer = nnx.merge(plan.graph, params).stacks[0]
        graph, stacked = nnx.split(layer)
        layer = nnx.merge(graph, jax.tree.map(lambda w: w[0], stacked))
        positions_BS = jnp.arange(length, dtype=jnp.int32)[None]
        contexts = {layout: SequenceContext(positions_BS, None, layout, mesh)}
        return jnp.sum(layer(x_BSD, contexts, layout, layout).astype(jnp.float32) ** 2)

    with jax.set_mesh(mesh):
        return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(plan.shapes, x_BSD).compile()
