"""Cyclic order: the row is cut into blocks and device r holds blocks r, r + P, r + 2P, ...

A document in the row is then spread over the devices block by block, however long it is, and the blocks that a query sees stand
one, two, ... devices behind it. In a ring every device so has work in the same few hops. With text of real lengths the longest
chain of hops that wait for each other is 1.5 times shorter over 8 devices, and 2.6 times over 64, than in zigzag order, which
balances rows of one document (`tests/test_balance.py`).
Source: block-cyclic distribution of dense matrices (Dongarra, van de Geijn, Walker 1994), here of one dimension.
"""

import jax
import jax.numpy as jnp
from jax import lax

BLOCK = 512  # tokens: a tile of a kernel
ENOUGH = 16  # blocks of a device with which a row of one document too is balanced, to 6 %
MOST = 32  # blocks of a device: a kernel looks for the tiles it needs in every one


def blocks_of(tokens: int, shards: int) -> int:
    """Blocks of a device that holds so many tokens: of `BLOCK` tokens or more, at least two where that divides.

    Either their number divides `shards` or `shards` divides it, so that devices exchange equal parts.
    """
    most = min(MOST, max(2, tokens // BLOCK))
    return next(n for n in range(most, 0, -1) if tokens % n == 0 and (n % shards == 0 or shards % n == 0))


def from_contiguous(x: jax.Array, shards: int, dim: int) -> jax.Array:
    """A device's slice in contiguous order -> its slice in cyclic order, in dimension `dim`."""
    blocks = _blocks(x, shards, dim)
    R = blocks.shape[0]
    if R % shards == 0:  # block i of every device goes to device i % P
        parts = blocks.reshape(R // shards, shards, *blocks.shape[1:])
        return _joined(lax.all_to_all(parts, "seq", split_axis=1, concat_axis=0, tiled=False), dim, like=x)
    group, slot = _group_and_slot(shards, R)
    found = []
    for n in range(R):
        sent = lax.dynamic_index_in_dim(blocks, (n + group) % R, keepdims=False)
        found.append(lax.ppermute(sent, "seq", _pairs(shards, R, n)))
    # What came in round n is the block of slot (rank - n) % R.
    return _joined(jnp.take(jnp.stack(found), (slot - jnp.arange(R)) % R, axis=0), dim, like=x)


def to_contiguous(x: jax.Array, shards: int, dim: int) -> jax.Array:
    """The inverse of `from_contiguous`."""
    blocks = _blocks(x, shards, dim)
    R = blocks.shape[0]
    if R % shards == 0:
        parts = blocks.reshape(shards, R // shards, *blocks.shape[1:])
        return _joined(lax.all_to_all(parts, "seq", split_axis=0, concat_axis=1, tiled=False), dim, like=x)
    group, slot = _group_and_slot(shards, R)
    found = []
    for n in range(R):
        sent = lax.dynamic_index_in_dim(blocks, (slot - n) % R, keepdims=False)
        back = [(there, here) for here, there in _pairs(shards, R, n)]
        found.append(lax.ppermute(sent, "seq", back))
    return _joined(jnp.take(jnp.stack(found), (jnp.arange(R) - group) % R, axis=0), dim, like=x)


def _blocks(x: jax.Array, shards: int, dim: int) -> jax.Array:
    """Blocks in front: R ... b ..."""
    R = blocks_of(x.shape[dim], shards)
    return jnp.moveaxis(x.reshape(*x.shape[:dim], R, -1, *x.shape[dim + 1 :]), dim, 0)


def _joined(blocks: jax.Array, dim: int, like: jax.Array) -> jax.Array:
    """The inverse of `_blocks`, of any number of leading dims."""
    blocks = blocks.reshape(-1, *blocks.shape[blocks.ndim - like.ndim :])
    return jnp.moveaxis(blocks, 0, dim).reshape(like.shape)


def _pairs(shards: int, R: int, n: int) -> list[tuple[int, int]]:
    """Who sends to whom in round n: a device its block (n + group) % R, so that no two send to the same."""
    return [(rank, (rank * R + (n + rank // (shards // R)) % R) % shards) for rank in range(shards)]


def _group_and_slot(shards: int, R: int) -> tuple[jax.Array, jax.Array]:
    """The devices rank, rank + P/R, ... send to the same R devices, each in a round of its own: (which of them, rank)."""
    rank = lax.axis_index("seq")
    return rank // (shards // R), rank
