"""What recurrent mixers share: their checks, their count of tokens, the scale at which they start."""

from typing import Any

import jax
import jax.numpy as jnp

from lcx import registry
from lcx.context import SequenceContext
from pallas_kernels import KERNELS

# Standard deviation of torch's linear layers, with which the published models start: uniform in 1 / sqrt(fan in).
LINEAR = 3**-0.5


def recurrence_problems(config: Any, op: str, length: int, mesh: dict[str, int]) -> list[str]:
    """What is wrong with a recurrent mixer's sizes, step sizes or the name of its implementation."""
    problems = [f"{name}={getattr(config, name)} must be at least 1" for name in ("expand", "state", "conv")]
    problems = [line for line in problems if getattr(config, line.partition("=")[0]) < 1]
    if not 0 < config.dt_min <= config.dt_max:
        problems.append(f"dt_min={config.dt_min} and dt_max={config.dt_max} must be above 0, the first no larger")
    if (shard := length // mesh["seq"]) < config.conv - 1:
        problems.append(
            f"conv={config.conv} reaches back {config.conv - 1} tokens and a shard has {shard}; use fewer devices on seq"
        )
    implementations = ("auto", *KERNELS[op])
    if config.implementation not in implementations:
        problems.append(str(registry.unknown("implementation", config.implementation, implementations)))
    return problems


def channel_problems(E: int, mesh: dict[str, int]) -> list[str]:
    """Channels are spread over tensor, and parameters that have only them over fsdp and seq as well."""
    owners = mesh["tensor"] * mesh["fsdp"] * mesh["seq"]
    return [f"expand*model.dim={E} does not divide over mesh.tensor*mesh.fsdp*mesh.seq={owners}"] if E % owners else []


def tokens_of(ctx: SequenceContext) -> jax.Array:
    """fp32 number of tokens that are not padding."""
    if ctx.segments_BS is None:
        return jnp.float32(ctx.positions_BS.size)
    return jnp.sum((ctx.segments_BS > 0).astype(jnp.float32))
