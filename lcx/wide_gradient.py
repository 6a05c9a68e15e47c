"""Arrays that every iteration of a loop reads in bf16 and whose gradient adds up over the iterations in fp32.

JAX gives a gradient the dtype of its array, so what a loop closes over would collect one rounding for every iteration. Here the
gradient goes to a second array instead, of fp32 zeros that nothing reads and the compiler drops:

    values, sums = widen(arrays)           # outside the loop
    arrays = joined(values, sums)          # inside it
"""

from typing import Any

import jax
import jax.numpy as jnp


def widen(arrays: Any) -> tuple[Any, Any]:
    """A pytree of arrays -> (the same values, which carry no gradient; fp32 zeros or None, which do)."""
    leaves, treedef = jax.tree.flatten(arrays)
    pairs = [_split(x) if _narrow(x) else (x, None) for x in leaves]
    return treedef.unflatten([x for x, _ in pairs]), [total for _, total in pairs]


def joined(values: Any, sums: list) -> Any:
    """The arrays for one iteration; their gradient is added to that of `sums`."""
    leaves, treedef = jax.tree.flatten(values)
    return treedef.unflatten([x if total is None else _join(x, total) for x, total in zip(leaves, sums, strict=True)])


def _narrow(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4


def _split(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jax.lax.stop_gradient(x), _zeros_for(x)


@jax.custom_vjp
def _zeros_for(x: jax.Array) -> jax.Array:
    return jnp.zeros(x.shape, jnp.float32)


_zeros_for.defvjp(lambda x: (_zeros_for(x), jnp.zeros((0,), x.dtype)), lambda like, grad: (grad.astype(like.dtype),))


@jax.custom_vjp
def _join(x: jax.Array, total: jax.Array) -> jax.Array:
    return x


_join.defvjp(lambda x, total: (x, None), lambda _, grad: (jnp.zeros_like(grad), grad.astype(jnp.float32)))
