"""RMS normalisation (arXiv 1910.07467)."""

import jax
import jax.numpy as jnp
from jax import lax


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * scale over the last dimension; statistics in fp32, result in x's dtype."""
    x_fp32 = x.astype(jnp.float32)
    normed = x_fp32 * lax.rsqrt(jnp.mean(x_fp32**2, axis=-1, keepdims=True) + eps)
    return (normed * scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)
