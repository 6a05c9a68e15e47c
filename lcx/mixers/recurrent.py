"""What recurrent mixers share: what they declare, their checks, their count of tokens."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lcx.context import SequenceContext
from lcx.mixers import Caps, implementation_problems


class Recurrent(nnx.Module):
    """A mixer that passes a state from token to token: contiguous order, and in it the same work on every device."""

    caps = Caps(layouts=("contiguous",), positions=False)

    @classmethod
    def balanced_layout(cls, config: Any, *, packed: bool, tokens: int, shards: int) -> str | None:
        """None: there is nothing to balance."""
        return None


def recurrence_problems(config: Any, op: str, length: int, mesh: dict[str, int]) -> list[str]:
    """What is wrong with a recurrent mixer's sizes, step sizes or the names of its implementations."""
    sizes = {name: getattr(config, name) for name in ("expand", "state", "conv")}
    problems = [f"{name}={size} must be at least 1" for name, size in sizes.items() if size < 1]
    if not 0 < config.dt_min <= config.dt_max:
        problems.append(f"dt_min={config.dt_min} and dt_max={config.dt_max} must be above 0, the first no larger")
    if (shard := length // mesh["seq"]) < config.conv - 1:
        cure = "lower mesh.seq" if mesh["seq"] > 1 else "lower it"
        problems.append(f"conv={config.conv} reaches back {config.conv - 1} tokens and a shard has {shard}; {cure}")
    problems += implementation_problems(op, config.implementation)
    return problems + implementation_problems("causal_conv", config.conv_implementation, "conv_implementation")


def channel_problems(E: int, mesh: dict[str, int]) -> list[str]:
    """Channels are spread over tensor, and parameters that have only them over fsdp and seq as well."""
    owners = mesh["tensor"] * mesh["fsdp"] * mesh["seq"]
    return [f"expand*model.dim={E} does not divide over mesh.tensor*mesh.fsdp*mesh.seq={owners}"] if E % owners else []


def tokens_of(ctx: SequenceContext) -> jax.Array:
    """fp32 number of tokens that are not padding."""
    if ctx.segments_BS is None:
        return jnp.float32(ctx.positions_BS.size)
    return jnp.sum((ctx.segments_BS > 0).astype(jnp.float32))
