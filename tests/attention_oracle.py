"""Attention written a second time, from the definition in the design and from nothing in `lcx`; loops and dense arrays."""

import jax.numpy as jnp
import numpy as np


def visible(i, j, seg_i, seg_j, order_in_document_j, *, causal, window, sink_tokens):
    """Whether a query at order i of document seg_i sees a key at order j."""
    if seg_i != seg_j or seg_j == 0:
        return False
    if causal and j > i:
        return False
    if window is None or order_in_document_j < sink_tokens:
        return True
    left, right = window
    return (left is None or i - j <= left) and (causal or right is None or j - i <= right)


def visible_BST(mask, order_q, order_k, segments_q, segments_k, sink_BT=None):
    """bool B S T by three loops. `sink_BT` overrides which keys count as first tokens."""
    B, S, T = len(segments_q), len(order_q), len(order_k)
    out = np.zeros((B, S, T), bool)
    for b in range(B):
        starts = {}
        for j, seg in zip(order_k, segments_k[b], strict=True):
            starts[seg] = min(starts.get(seg, j), j)
        for t in range(T):
            within = order_k[t] - starts[segments_k[b][t]]
            if sink_BT is not None:
                within = 0 if sink_BT[b][t] else mask.sink_tokens
            for s in range(S):
                pair = order_q[s], order_k[t], segments_q[b][s], segments_k[b][t], within
                out[b, s, t] = visible(*pair, causal=mask.causal, window=mask.window, sink_tokens=mask.sink_tokens)
    return out


def attention(q_BSHK, k_BTGK, v_BTGK, sink_logits_H, slopes_H, visible_BST, distance_ST, *, scale, softcap):
    """(o_BSHK, lse_BHS) from dense scores, one key/value head per query head; distance_ST is |i - j|."""
    R = q_BSHK.shape[2] // k_BTGK.shape[2]
    k_BTHK, v_BTHK = jnp.repeat(k_BTGK, R, axis=2), jnp.repeat(v_BTGK, R, axis=2)
    scores = jnp.einsum("bshk,bthk->bhst", q_BSHK, k_BTHK) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if slopes_H is not None:
        scores = scores - slopes_H[None, :, None, None] * distance_ST[None, None]
    weights = jnp.where(visible_BST[:, None], jnp.exp(scores), 0.0)
    total = weights.sum(-1)
    if sink_logits_H is not None:
        total = total + jnp.exp(sink_logits_H)[None, :, None]
    seen = total > 0
    safe = jnp.where(seen, total, 1.0)
    o = jnp.einsum("bhst,bthk->bshk", weights / safe[..., None], v_BTHK)
    return o, jnp.where(seen, jnp.log(safe), -jnp.inf)
