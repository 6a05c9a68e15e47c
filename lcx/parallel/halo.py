"""What a device needs of the tokens to its left."""

import jax
from jax import lax

from lcx.registry import UserError


def from_left(x_BsE: jax.Array, tokens: int, *, shards: int, axis: str = "seq") -> jax.Array:
    """The last `tokens` tokens of the device to the left, B tokens ...; zeros on the first device. Differentiable.

    Args:
      x_BsE: B s ... of this device; call inside a region where `axis` is manual.
      tokens: at most s.
      shards: devices along `axis`.

    Raises:
      UserError: a shard has fewer tokens.
    """
    if tokens > x_BsE.shape[1]:
        raise UserError(f"a halo of {tokens} tokens needs shards of as many, and they have {x_BsE.shape[1]}; use fewer devices")
    return lax.ppermute(x_BsE[:, x_BsE.shape[1] - tokens :], axis, [(r, r + 1) for r in range(shards - 1)])
