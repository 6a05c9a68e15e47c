"""Trading tokens for heads: an all-to-all after which each device of a group holds all the group's tokens of some heads.

With fewer key/value heads than devices, the devices that need the same head first collect disjoint shares of its tokens and
then gather each other's; a key or value is never repeated before it is sent.

Source: Jacobs et al., "DeepSpeed Ulysses" (arXiv 2309.14509); the sharing of key/value heads is ours.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from lcx.parallel.layouts import contiguous_to_gathered, gathered_to_contiguous


def heads_fit(q_heads: int, kv_heads: int, degree: int) -> bool:
    """Whether groups of `degree` devices can split these heads."""
    return q_heads % degree == 0 and (kv_heads % degree == 0 or degree % kv_heads == 0)


@dataclasses.dataclass(frozen=True)
class HeadExchange:
    """The exchange within groups of `degree` neighbouring devices. Heads are split evenly, in order; tokens come out in order.

    Attributes:
      shards: devices along `seq`.
      degree: devices in a group, U.
      kv_heads: key/value heads of a tensor shard; see `heads_fit`.
      layout: in which the tokens of a group stand. A group of a zigzag row is a zigzag row of its own: its low chunks
        ascend, its high chunks descend.
    """

    shards: int
    degree: int
    kv_heads: int
    layout: str

    @property
    def sharing(self) -> int:
        """Devices that hold the same key/value head; they are neighbours."""
        return max(1, self.degree // self.kv_heads)

    def _everyone(self) -> list[list[int]] | None:
        """Whole groups, as `axis_index_groups`."""
        if self.degree == self.shards:
            return None
        return [list(range(base, base + self.degree)) for base in range(0, self.shards, self.degree)]

    def _traders(self) -> list[list[int]]:
        """Devices that hold one head each and have them all between them."""
        bases = range(0, self.shards, self.degree)
        return [list(range(base + i, base + self.degree, self.sharing)) for base in bases for i in range(self.sharing)]

    def _sharers(self) -> list[list[int]]:
        """Devices that hold the same head."""
        return [list(range(first, first + self.sharing)) for first in range(0, self.shards, self.sharing)]

    def gather_queries(self, x: jax.Array, *, tokens_dim: int = 1, heads_dim: int = 2) -> jax.Array:
        """This device's tokens of all heads -> all tokens of the group, in order, of its H / U heads."""
        x = _trade(x, heads_dim, tokens_dim, self._everyone())
        return gathered_to_contiguous(x, self.layout, self.degree, tokens_dim)

    def return_queries(self, x_BSHK: jax.Array) -> jax.Array:
        """The inverse of `gather_queries`."""
        x_BSHK = contiguous_to_gathered(x_BSHK, self.layout, self.degree)
        return _trade(x_BSHK, 1, 2, self._everyone())

    def return_lse(self, lse_BHS: jax.Array) -> jax.Array:
        """The inverse of `gather_queries` for B H S."""
        return _trade(contiguous_to_gathered(lse_BHS, self.layout, self.degree, 2), 2, 1, self._everyone())

    def gather_keys(self, x_BtGK: jax.Array) -> jax.Array:
        """This device's keys of all heads -> all keys of the group, in order, of the heads that its queries read."""
        if self.sharing == 1:
            return self.gather_queries(x_BtGK)
        B, t, _, K = x_BtGK.shape
        x = _trade(x_BtGK, 2, 1, self._traders()).reshape(B, self.kv_heads, t, 1, K)
        x = lax.all_gather(x, "seq", axis=2, axis_index_groups=self._sharers())
        return gathered_to_contiguous(x.reshape(B, self.degree * t, 1, K), self.layout, self.degree)

    def return_key_grads(self, dx_BTGK: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """The transpose of `gather_keys`: sums over the devices that share a head in fp32, then travels in `dtype`."""
        if self.sharing == 1:
            return self.return_queries(dx_BTGK.astype(dtype))
        B, T, _, K = dx_BTGK.shape
        dx = contiguous_to_gathered(dx_BTGK, self.layout, self.degree)
        dx = dx.reshape(B, self.kv_heads, self.sharing, T // self.degree, 1, K)
        dx = lax.psum_scatter(dx, "seq", scatter_dimension=2, axis_index_groups=self._sharers())
        return _trade(dx.astype(dtype).reshape(B, T // self.sharing, 1, K), 1, 2, self._traders())

    def gather_tokens(self, x_Bs: jax.Array) -> jax.Array:
        """What is known about each token, of all tokens of the group, in order."""
        if self.degree == 1:
            return x_Bs
        x = lax.all_gather(x_Bs, "seq", axis=1, tiled=True, axis_index_groups=self._everyone())
        return gathered_to_contiguous(x, self.layout, self.degree)

    def own_heads(self, x_H: jax.Array) -> jax.Array:
        """Of a value per query head, those of this device's heads."""
        h = x_H.shape[0] // self.degree
        return lax.dynamic_slice_in_dim(x_H, lax.axis_index("seq") % self.degree * h, h)


def _trade(x: jax.Array, split_dim: int, concat_dim: int, groups: list[list[int]] | None) -> jax.Array:
    if groups and len(groups[0]) == 1:
        return x
    return lax.all_to_all(x, "seq", split_axis=split_dim, concat_axis=concat_dim, tiled=True, axis_index_groups=groups)
