"""Attention by its definition: every score at once, fp32. The oracle for every other implementation, and nothing else."""

import jax.numpy as jnp

from lcx.ops.partials import merge
from lcx.ops.types import Runs
from lcx.ops.visibility import visible_BST

KEYS_LIMIT = 16_384


def refuse(spec, shapes, dtypes, device_kind):
    """Refuses long sequences: scores are S x T."""
    keys = shapes["k"][1]
    return f"it holds all scores at once and takes at most {KEYS_LIMIT} keys, not {keys}" if keys > KEYS_LIMIT else None


def _order(order):
    return order.order() if isinstance(order, Runs) else order


def _scores_BGRST(q, k, spec, order_q, order_k, segments, alibi_slopes_H):
    """Scores, -inf where hidden, and the derivative of the soft-cap."""
    (B, S, H, K), G = q.shape, k.shape[2]
    i, j = _order(order_q), _order(order_k)
    scores = jnp.einsum("bsgrk,btgk->bgrst", q.reshape(B, S, G, H // G, K), k, preferred_element_type=jnp.float32) * spec.scale
    slope = jnp.ones_like(scores)
    if spec.softcap is not None:
        slope = 1 - jnp.tanh(scores / spec.softcap) ** 2
        scores = spec.softcap * jnp.tanh(scores / spec.softcap)
    if alibi_slopes_H is not None:
        distance_ST = jnp.abs(i[:, None] - j[None, :]).astype(jnp.float32)
        scores = scores - alibi_slopes_H.reshape(1, G, H // G, 1, 1) * distance_ST[None, None, None]
    visible = visible_BST(spec.mask, i, j, segments.q_BS, segments.k_BT, segments.sink_BT)
    return scores if visible is None else jnp.where(visible[:, None, None], scores, -jnp.inf), slope


def forward(q_BSHK, k_BTGK, v_BTGK, *, spec, order_q, order_k, segments, alibi_slopes_H=None, carry=None):
    """See `lcx.ops.attention`, "Backends"."""
    scores, _ = _scores_BGRST(q_BSHK, k_BTGK, spec, order_q, order_k, segments, alibi_slopes_H)
    top = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(top == -jnp.inf, 0, top))
    total = weights.sum(-1, keepdims=True)
    weights = weights / jnp.where(total == 0, 1, total)
    o = jnp.einsum("bgrst,btgk->bsgrk", weights, v_BTGK.astype(jnp.float32)).reshape(q_BSHK.shape)
    lse = (top + jnp.log(total)).reshape(q_BSHK.shape[0], q_BSHK.shape[2], -1)
    return (o, lse) if carry is None else merge(*carry, o, lse)


def backward(q_BSHK, k_BTGK, v_BTGK, do_BSHK, lse_BHS, delta_BHS, *, spec, order_q, order_k, segments, alibi_slopes_H=None):
    """See `lcx.ops.attention`, "Backends"."""
    (B, S, H, K), G = q_BSHK.shape, k_BTGK.shape[2]
    grouped = lambda x: x.astype(jnp.float32).reshape(B, S, G, H // G, K)
    rows = lambda x: x.reshape(B, G, H // G, S)[..., None]
    q, do, k, v = grouped(q_BSHK), grouped(do_BSHK), k_BTGK.astype(jnp.float32), v_BTGK.astype(jnp.float32)
    scores, slope = _scores_BGRST(q_BSHK, k_BTGK, spec, order_q, order_k, segments, alibi_slopes_H)
    p = jnp.exp(scores - rows(jnp.where(lse_BHS == -jnp.inf, jnp.inf, lse_BHS)))
    ds = p * (jnp.einsum("bsgrk,btgk->bgrst", do, v) - rows(delta_BHS)) * slope * spec.scale
    dq = jnp.einsum("bgrst,btgk->bsgrk", ds, k).reshape(q_BSHK.shape)
    return dq, jnp.einsum("bgrst,bsgrk->btgk", ds, q), jnp.einsum("bgrst,bsgrk->btgk", p, do)
