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


def uniform(rngs: nnx.Rngs, dims: str, shape: tuple[int, ...], bound: float, *, decay: bool = True) -> nnx.Param:
    """Evenly spread over (-bound, bound); `decay=False` for a bias of several dims."""
    return nnx.Param(jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound), dims=dims, decay=decay)


def step_size_bias(rngs: nnx.Rngs, dims: str, shape: tuple[int, ...], least: float, most: float) -> nnx.Param:
    """The bias whose softplus is spread evenly over the logarithm of (least, most), at least 1e-4; not decayed.

    Source: Gu and Dao, "Mamba" (2023), section 3.6; the authors' code.
    """
    steps = jnp.exp(jax.random.uniform(rngs.params(), shape, jnp.float32, math.log(least), math.log(most)))
    steps = jnp.maximum(steps, 1e-4)
    return nnx.Param(steps + jnp.log(-jnp.expm1(-steps)), dims=dims, decay=False)


def undecayed(value: jax.Array, dims: str) -> nnx.Param:
    """A parameter that starts at a value and has no weight decay."""
    return nnx.Param(value.astype(jnp.float32), dims=dims, decay=False)
