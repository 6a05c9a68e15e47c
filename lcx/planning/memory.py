"""Bytes that a compiled program needs, from the compiler and for the device it was compiled for."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from lcx.context import SequenceContext
from lcx.data.loader import BATCH_SPEC
from lcx.data.rows import DTYPES
from lcx.experiment import Experiment, sizes_of
from lcx.registry import UserError
from lcx.train_loop import optimizer as optimizers
from lcx.train_loop.state import abstract_state, plan_model
from lcx.train_loop.step import compile_train_step


def temp_bytes(fn: Callable, *args: Any, mesh: Mesh) -> int:
    """Temporary bytes of a device while `fn` runs on arguments of these shapes. Nothing is allocated or run."""
    with jax.set_mesh(mesh):
        return jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes


def compiled_bytes(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Bytes on each device that a compiled program needs, as its compiler states them.

    Returns:
      arguments, outputs, temporary; outputs that take over an argument's memory are in both. peak: the most at any one time.
      On a CPU, whose compiler leaves temporaries out of its peak, it is the sum.
    """
    sizes = compiled.memory_analysis()
    found = dict(arguments=sizes.argument_size_in_bytes, outputs=sizes.output_size_in_bytes, temporary=sizes.temp_size_in_bytes)
    everything = sum(found.values()) - sizes.alias_size_in_bytes
    device = next(iter(jax.tree.leaves(compiled.input_shardings)[0].device_set))
    return found | {"peak": everything if device.platform == "cpu" else sizes.peak_memory_in_bytes}


def check_fits(needed: dict[str, int], device: jax.Device, experiment: Experiment) -> None:
    """Compares what a compiled step needs with what a device has; CPUs and devices that do not say are let through.

    Raises:
      UserError: it does not fit.
    """
    limit = (device.memory_stats() or {}).get("bytes_limit", 0)
    if limit and needed["peak"] > limit:
        need, have = (f"{count / 2**30:.1f}" for count in (needed["peak"], limit))
        raise UserError(
            f"sequence.length={experiment.sequence.length} needs {need} GiB on each {device.device_kind} and it has {have}; "
            "use more devices (mesh.seq), a shorter sequence, or --config.scale=rehearsal"
        )


def compile_for(experiment: Experiment, mesh: Mesh) -> jax.stages.Compiled:
    """The whole train step of a run on text, compiled for a mesh; no data is looked at, nothing is allocated or run.

    Args:
      experiment: resolved for as many devices as the mesh has.
      mesh: of devices that are here, or of `lcx.planning.topologies`.

    Raises:
      UserError: `model.vocab` is not stated, or does not divide over `tensor`.
    """
    if experiment.model.vocab is None:
        raise UserError("model.vocab=None: state the vocabulary to plan a run without its data")
    plan = plan_model(experiment, sizes_of(experiment, experiment.model.vocab))
    optimizer = optimizers.build(experiment.optimizer, experiment.train.steps, plan.infos)
    shape, home = (experiment.train.batch, experiment.sequence.length), NamedSharding(mesh, BATCH_SPEC)
    batch = {f"{name}_BS": jax.ShapeDtypeStruct(shape, dtype, sharding=home) for name, dtype in DTYPES.items()}
    with jax.set_mesh(mesh):
        return compile_train_step(experiment, plan, optimizer, mesh, abstract_state(optimizer, plan, mesh), batch)


def train_step_memory(experiment: Experiment, mesh: Mesh) -> dict[str, int]:
    """`compiled_bytes` of the whole train step; see `compile_for`."""
    return compiled_bytes(compile_for(experiment, mesh))


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
