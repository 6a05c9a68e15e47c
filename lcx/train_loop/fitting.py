"""The compiled step that fits the devices' memory, or one line that says by how much none does."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from lcx import remat
from lcx.dims import Sizes
from lcx.experiment import Experiment
from lcx.planning.memory import compiled_bytes, shortfall
from lcx.registry import UserError
from lcx.train_loop.state import ModelPlan, abstract_state, plan_model
from lcx.train_loop.step import compile_train_step


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A step and what it was compiled from.

    Attributes:
      experiment: with `block.remat` resolved.
      plan: of its model.
      step: takes over the memory of the state that it is given.
      bytes: see `lcx.planning.memory.compiled_bytes`.
    """

    experiment: Experiment
    plan: ModelPlan
    step: jax.stages.Compiled
    bytes: dict[str, int]


def compile_fitting(
    experiment: Experiment,
    sizes: Sizes,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    batch: Any,
    *,
    say: Callable[[str], None] = lambda line: None,
) -> Fitted:
    """Compiles the train step; nothing is allocated. Call under `jax.set_mesh(mesh)`.

    With `block.remat=auto` the policy that keeps only layer inputs is compiled where the faster one does not fit. Devices that
    do not tell their memory, CPUs among them, are taken to have enough.

    Args:
      batch: arrays, or ShapeDtypeStructs with their shardings.
      say: told when a policy does not fit and another is tried.

    Raises:
      UserError: no policy fits.
    """
    policies = remat.candidates(experiment.block.remat)
    for keep in policies:
        tried = dataclasses.replace(experiment, block=dataclasses.replace(experiment.block, remat=keep))
        plan = plan_model(tried, sizes)
        try:
            step = compile_train_step(tried, plan, optimizer, mesh, abstract_state(optimizer, plan, mesh), batch)
            needed = compiled_bytes(step)
            missing = shortfall(needed, next(iter(mesh.local_devices), mesh.devices.flat[0]))
        except jax.errors.JaxRuntimeError as error:
            if (missing := out_of_memory(error)) is None:
                raise
        if jax.process_count() > 1 and multihost_utils.process_allgather(np.bool_(missing is not None)).any():
            missing = missing or "does not fit on the devices of another process"
        if missing is None:
            return Fitted(tried, plan, step, needed)
        if keep != policies[-1]:
            say(f"with block.remat={keep} the step {missing}; compiling it again with block.remat={policies[-1]}")
    smaller = "" if policies[-1] == "minimal" else "block.remat=minimal, "
    raise UserError(
        f"sequence.length={experiment.sequence.length} with block.remat={policies[-1]} {missing}; "
        f"use {smaller}more devices (mesh.seq), a shorter sequence, or --config.scale=rehearsal"
    )


def out_of_memory(error: Exception) -> str | None:
    """What a compiler says that gives up for want of memory; None for any other failure."""
    text = " ".join(str(error).split())
    if "RESOURCE_EXHAUSTED" not in text:
        return None
    figures = re.search(r"Used (\S+) of (\S+) (\w+)", text)
    return (
        f"needs {figures[1]} of {figures[3]} on each device and it has {figures[2]}" if figures else f"does not fit: {text[:200]}"
    )
