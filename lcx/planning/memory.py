"""Bytes that a compiled program needs, from the compiler and for the device it was compiled for."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from lcx.context import SequenceContext
from lcx.experiment import Experiment
from lcx.train_loop.state import plan_model


def temp_bytes(fn: Callable, *args: Any, mesh: Mesh) -> int:
    """Temporary bytes of a device while `fn` runs on arguments of these shapes. Nothing is allocated or run."""
    with jax.set_mesh(mesh):
        return jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes


def layer_temp_bytes(experiment: Experiment, mesh: Mesh) -> int:
    """Temporary bytes of the forward and backward pass of the first layer, batch 1, without embedding and head.

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
        return jnp.sum(layer(x_BSD, contexts, layout).astype(jnp.float32) ** 2)

    return temp_bytes(jax.grad(loss, argnums=(0, 1)), plan.shapes, x_BSD, mesh=mesh)
