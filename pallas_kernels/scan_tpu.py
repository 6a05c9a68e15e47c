"""What the TPU kernels of the recurrences and of the convolution share: where they run, exp, and the softplus of step sizes."""

import math

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_tpu import not_for
from pallas_kernels.support_mesh import left_to_compiler

LOG2E, LN2 = math.log2(math.e), math.log(2)
# log(1 + x) / x from 0 to 1: the polynomial of its degree with the least relative error, 3e-8 before rounding.
LOG1P = (1.0, -0.49999493, 0.33319096, -0.24842979, 0.19105993, -0.13663214, 0.07822556, -0.029504987, 0.0052326294)


def not_here(device_kind: str) -> str | None:
    """Why neither kernel runs where this is traced; None where they do."""
    return not_for(device_kind) or left_to_compiler()


def exp(x: jax.Array) -> jax.Array:
    """exp, good to 5e-7 of itself for x from -10 to 10 and to 8e-7 from -30 to 30.

    The compiler makes exp2(x log2(e)) of jnp.exp, which errs by the rounding of the product: by 2e-6 at -30. Here x itself is an
    exponent, which is exact, and the product is smaller.
    """
    return jnp.exp2(x) * jnp.exp2((LOG2E - 1) * x)


def log1p(x: jax.Array) -> jax.Array:
    """log(1 + x) of x from 0 to 1, good to 2e-7 of itself; no logarithm is taken, whose error next to 1 is a device's secret."""
    total = LOG1P[-1]
    for factor in LOG1P[-2::-1]:
        total = total * x + factor
    return x * total


def softplus(x: jax.Array) -> jax.Array:
    """log(1 + exp(x)), good to 5e-7 of itself down to steps of 5e-5, and to 8e-7 down to 1e-13."""
    return jnp.maximum(x, 0) + log1p(exp(-jnp.abs(x)))


def quick_softplus(x: jax.Array) -> jax.Array:
    """The same in 10 instructions less, and as good where the logarithm's error next to 1 is in proportion to its size.

    What 1 + exp(-|x|) loses of exp(-|x|) is added behind the logarithm.
    """
    small = exp(-jnp.abs(x))
    whole = 1 + small
    return jnp.maximum(x, 0) + (jnp.log2(whole) * LN2 + (small - (whole - 1)))
