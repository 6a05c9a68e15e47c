"""What a strategy of `context_attention` knows statically, and the one place where it calls an attention backend."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lcx.ops.attention import attention_backend
from lcx.ops.types import AttentionSpec, Mask, Runs, Segments


def is_windowed(mask: Mask) -> bool:
    """Whether the window hides anything; without that, sink tokens are visible anyway."""
    return mask.left is not None or (not mask.causal and mask.right is not None)


@dataclasses.dataclass(frozen=True)
class Plan:
    """One call of `context_attention`, static and hashable.

    Attributes:
      spec: mask, scale, soft-cap.
      layout: order of the tokens over the devices.
      shards: devices along the sequence, P.
      length: tokens of the whole row, padding included.
      q_heads, kv_heads: heads of one call: those that one tensor shard holds, or of them a pass takes.
      packed: document ids are given, and travel with the keys.
      dtype: type in which the output is kept, and may travel once it is final.
      implementation: of the attention backend.
      ulysses_degree: devices in one Ulysses group; None takes the largest that the heads allow.
      hidden: how many leading tokens of the row nobody sees as keys, because they are attended to apart.
    """

    spec: AttentionSpec
    layout: str
    shards: int
    length: int
    q_heads: int
    kv_heads: int
    packed: bool
    dtype: jnp.dtype
    implementation: str
    ulysses_degree: int | None = None
    hidden: int = 0

    def with_heads(self, q_heads: int, kv_heads: int) -> "Plan":
        """The same with other numbers of heads."""
        return dataclasses.replace(self, q_heads=q_heads, kv_heads=kv_heads)

    @property
    def key_copies(self) -> int:
        """Devices of a Ulysses group that hold the same key/value head, when there are fewer heads than devices."""
        return max(1, (self.ulysses_degree or 1) // self.kv_heads)

    @property
    def has_sinks(self) -> bool:
        """Whether some keys are exempt from the window."""
        return self.spec.mask.sink_tokens > 0 and is_windowed(self.spec.mask)


class Keys(NamedTuple):
    """A block of keys as it travels between devices.

    Attributes:
      k_BtGK, v_BtGK: keys and values in their own dtype, one per key/value head.
      tokens_Bt: int32, 2 * document id + whether the key is a sink; None where no documents are given.
    """

    k_BtGK: jax.Array
    v_BtGK: jax.Array
    tokens_Bt: jax.Array | None

    def heads(self, part: int, parts: int) -> "Keys":
        """An equal part of the heads."""
        return Keys(_part(self.k_BtGK, 2, part, parts), _part(self.v_BtGK, 2, part, parts), self.tokens_Bt)


class Queries(NamedTuple):
    """The queries of one device, with what the backward pass knows about each.

    Attributes:
      q_BsHK: queries.
      order: where they stand in the row.
      tokens_Bs: as in `Keys`.
      slopes_H: ALiBi slopes of these heads, or None.
      do_BsHK, lse_BHs, delta_BHs: gradient of the output, logsumexp over all keys and sum(do * o) - dlse; backward only.
    """

    q_BsHK: jax.Array
    order: Runs
    tokens_Bs: jax.Array | None
    slopes_H: jax.Array | None
    do_BsHK: jax.Array | None = None
    lse_BHs: jax.Array | None = None
    delta_BHs: jax.Array | None = None

    def halves(self) -> tuple["Queries", "Queries"]:
        """The first run and the second, or the halves of the only one, which has at least two tokens."""
        early, late = self.order.halves()

        def part(order: Runs, low: int) -> Queries:
            cut = lambda x, dim: None if x is None else lax.slice_in_dim(x, low, low + order.size, axis=dim)
            by_token = dict(q_BsHK=1, tokens_Bs=1, do_BsHK=1, lse_BHs=2, delta_BHs=2)
            return self._replace(order=order, **{name: cut(getattr(self, name), dim) for name, dim in by_token.items()})

        return part(early, 0), part(late, early.size)

    def heads(self, part: int, parts: int) -> "Queries":
        """An equal part of the heads."""
        by_head = dict(q_BsHK=2, slopes_H=0, do_BsHK=2, lse_BHs=1, delta_BHs=1)
        return self._replace(**{name: _part(getattr(self, name), dim, part, parts) for name, dim in by_head.items()})

    def packed(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """As it travels: q, do, and in one int32 array B n s what is known of each query, so that it takes one transfer."""
        rows = [lax.bitcast_convert_type(x_BHs, jnp.int32) for x_BHs in (self.lse_BHs, self.delta_BHs)]
        if self.tokens_Bs is not None:
            rows.append(self.tokens_Bs[:, None])
        return self.q_BsHK, self.do_BsHK, jnp.concatenate(rows, axis=1)

    def unpacked(self, travelled: tuple[jax.Array, jax.Array, jax.Array], order: Runs) -> "Queries":
        """The queries of the same heads that another device packed; they stand at `order`."""
        q_BsHK, do_BsHK, rows_Bns = travelled
        H = q_BsHK.shape[2]
        lse_BHs, delta_BHs = (lax.bitcast_convert_type(rows_Bns[:, n : n + H], jnp.float32) for n in (0, H))
        tokens_Bs = None if self.tokens_Bs is None else rows_Bns[:, 2 * H]
        return Queries(q_BsHK, order, tokens_Bs, self.slopes_H, do_BsHK, lse_BHs, delta_BHs)


def _part(x: jax.Array | None, dim: int, part: int, parts: int) -> jax.Array | None:
    """One of equal parts along a dim."""
    if x is None:
        return None
    size = x.shape[dim] // parts
    return lax.slice_in_dim(x, part * size, (part + 1) * size, axis=dim)


def pack_tokens(segments: jax.Array, sink: jax.Array | None) -> jax.Array:
    """Document ids and sink flags as one int32 array, so that they take one transfer."""
    return 2 * segments.astype(jnp.int32) + (0 if sink is None else sink.astype(jnp.int32))


def _describe(plan: Plan, queries: Queries, keys: Keys, order_k: Runs) -> Segments:
    sink_BT = None
    if keys.tokens_Bt is not None:
        if plan.has_sinks:
            sink_BT = keys.tokens_Bt % 2 == 1
        return Segments(queries.tokens_Bs // 2, keys.tokens_Bt // 2, sink_BT)
    if plan.hidden:
        seen_T = (order_k.order() >= plan.hidden).astype(jnp.int32)
        (B, s), t = queries.q_BsHK.shape[:2], keys.k_BtGK.shape[1]
        return Segments(jnp.ones((B, s), jnp.int32), jnp.broadcast_to(seen_T[None], (B, t)), None)
    if plan.has_sinks:
        first_T = order_k.order() < plan.spec.mask.sink_tokens
        sink_BT = jnp.broadcast_to(first_T[None], keys.k_BtGK.shape[:2])
    return Segments(None, None, sink_BT)


def _call(plan: Plan, queries: Queries, keys: Keys, order_k: Runs):
    """The backend for this block, and the keywords both of its functions take."""
    segments = _describe(plan, queries, keys, order_k)
    q, k, v = queries.q_BsHK, keys.k_BtGK, keys.v_BtGK
    described = dict(segments_q_BS=segments.q_BS, segments_k_BT=segments.k_BT, sink_BT=segments.sink_BT)
    backend = attention_backend(plan.implementation, plan.spec, q, k, v, **described, alibi_slopes_H=queries.slopes_H)
    orders = dict(order_q=queries.order, order_k=order_k)
    return backend, dict(spec=plan.spec, **orders, segments=segments, alibi_slopes_H=queries.slopes_H)


def block_forward(plan: Plan, queries: Queries, keys: Keys, order_k: Runs, carry=None) -> tuple[jax.Array, jax.Array]:
    """The partial (o_BsHK, lse_BHs) over one block of keys, merged with `carry`; fp32."""
    backend, options = _call(plan, queries, keys, order_k)
    return backend.forward(queries.q_BsHK, keys.k_BtGK, keys.v_BtGK, **options, carry=carry)


def block_backward(plan: Plan, queries: Queries, keys: Keys, order_k: Runs) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """What one block of keys contributes: dq_BsHK, (dk_BtGK, dv_BtGK); fp32."""
    backend, options = _call(plan, queries, keys, order_k)
    rows = queries.do_BsHK, queries.lse_BHs, queries.delta_BHs
    dq, dk, dv = backend.backward(queries.q_BsHK, keys.k_BtGK, keys.v_BtGK, *rows, **options)
    return dq, (dk, dv)
