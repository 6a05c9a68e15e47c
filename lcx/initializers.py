"""Parameters at the start of training: fp32, with their logical dimensions beside them."""

import math

import jax
import jax.numpy as jnp
from flax import nnx


def matrix(rngs: nnx.Rngs, dims: str, shape: tuple[int, ...], *, fan_in: int, gain: float = 1.0) -> nnx.Param:
    """A weight of standard deviation gain / sqrt(fan_in), normal truncated at two deviations."""
    # 0.8796 is the standard deviation of a unit normal truncated at 2, which would otherwise shrink every weight by it.
    deviation = gain / math.sqrt(fan_in) / 0.87962566103423978
    return nnx.Param(deviation * jax.random.truncated_normal(rngs.params(), -2.0, 2.0, shape, jnp.float32), dims=dims)


def vector(dims: str, shape: tuple[int, ...], value: float) -> nnx.Param:
    """A constant vector such as a norm's scale."""
    return nnx.Param(jnp.full(shape, value, jnp.float32), dims=dims)
