"""What `Mask` means: the predicate for a pair of tokens, and its bound for a pair of tiles.

The second is what makes masked tiles free: it looks at the first and last order and the lowest and highest document of
each tile only, so it takes memory in proportion to the number of tiles, not of pairs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lcx.ops.types import Mask

NO_DOCUMENT = jnp.iinfo(jnp.int32).max


def visible_BST(mask: Mask, order_S: jax.Array, order_T: jax.Array, q_BS, k_BT, sink_BT) -> jax.Array | None:
    """Whether each query sees each key: bool B S T, or 1 S T where no document ids tell rows apart; None if every key is seen.

    Args:
      mask: static visibility.
      order_S, order_T: int32 order of the queries and keys.
      q_BS, k_BT: int32 document ids, or both None.
      sink_BT: bool, keys that the window never hides, or None.
    """
    distance_1ST = (order_S[:, None] - order_T[None, :])[None]
    terms = []
    if mask.left is not None:
        terms.append(distance_1ST <= mask.left)
    if mask.right is not None and not mask.causal:
        terms.append(distance_1ST >= -mask.right)
    if terms and sink_BT is not None:
        terms = [_all(terms) | sink_BT[:, None, :]]
    if mask.causal:
        terms.append(distance_1ST >= 0)
    if q_BS is not None:
        terms.append((q_BS[:, :, None] == k_BT[:, None, :]) & (k_BT != 0)[:, None, :])
    return _all(terms) if terms else None


def _all(terms: list[jax.Array]) -> jax.Array:
    result = terms[0]
    for term in terms[1:]:
        result = result & term
    return result


class TileBounds(NamedTuple):
    """Extremes of one tile, or of many in a leading dimension.

    Attributes:
      first, last: lowest and highest order in the tile.
      low_B, high_B: lowest and highest document id, padding left out; None without document ids. A tile of padding has
        low above every high.
      sink: bool, whether the tile holds a key that the window never hides; None without such keys.
    """

    first: jax.Array
    last: jax.Array
    low_B: jax.Array | None
    high_B: jax.Array | None
    sink: jax.Array | None


def tile_visible(mask: Mask, q: TileBounds, k: TileBounds) -> jax.Array:
    """bool, one per key tile: False only where no query of the one tile q sees any key of it. k describes many tiles."""
    seen = jnp.ones(k.first.shape, bool)
    if mask.left is not None:
        seen = seen & (q.first - k.last <= mask.left)
    if mask.right is not None and not mask.causal:
        seen = seen & (q.last - k.first >= -mask.right)
    if k.sink is not None:
        seen = seen | k.sink
    if mask.causal:
        seen = seen & (q.last >= k.first)
    if q.low_B is not None:
        seen = seen & jnp.any((q.low_B[None] <= k.high_B) & (k.low_B <= q.high_B[None]), axis=1)
    return seen


def tile_full(mask: Mask, q: TileBounds, k: TileBounds) -> jax.Array:
    """bool, one per pair of tiles (the bounds broadcast against each other): True only where every query of q sees every key
    of k, given that neither holds padding."""
    seen = jnp.ones(jnp.broadcast_shapes(q.first.shape, k.first.shape), bool)
    if mask.left is not None:
        seen = seen & (q.last - k.first <= mask.left)
    if mask.right is not None:
        seen = seen & (q.first - k.last >= -mask.right)
    if q.low_B is not None:
        seen = seen & (q.low_B == q.high_B) & (k.low_B == k.high_B) & (q.low_B == k.low_B)
    return seen


def leading_tokens_BT(count: int, order_T: jax.Array, segments_BT: jax.Array | None, batch: int) -> jax.Array:
    """bool B T: whether a key is one of the first `count` tokens of its document. The keys are whole rows, in any order.

    A slice of a row cannot tell where its first document began.
    """
    if segments_BT is None:
        return jnp.broadcast_to((order_T < count)[None], (batch, order_T.shape[0]))
    by_order = jnp.argsort(order_T)
    order_1T, segments = order_T[by_order][None], segments_BT[:, by_order]
    before = jnp.pad(segments[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    start_BT = jax.lax.cummax(jnp.where(segments != before, order_1T, -1), axis=1)
    leading = (order_1T - start_BT < count) & (segments != 0)
    return leading[:, jnp.argsort(by_order)]
