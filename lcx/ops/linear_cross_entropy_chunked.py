"""The loss in chunks of tokens, with its own gradient.

When only the sum is asked for, its cotangent is a scalar, so the forward rule already leaves d(sum)/dx and d(sum)/dw: three
products in all (logits, dx, dw) where recomputation needs four. A loss per token has a cotangent per token, known only in the
backward pass; then the logits are computed again. Source for chunking: Mini-Sequence Transformer (Luo et al. 2024).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lcx.ops.linear_cross_entropy import LossSpec

# For each weight a chunk moves 12 bytes (w read twice in bf16, dw in and out in fp32) and computes 6 FLOPs a token, whatever S
# and D: with 8192 tokens a chip of 200 FLOPs a byte spends 5 % of the time on moving. Past 128K words the logits of a chunk are
# kept to 4 GiB, down to 1024 tokens.
CHUNKS = (1024, 8192)
LOGIT_BYTES = 2**32


def default_chunk(vocabulary: int) -> int:
    """Tokens in a chunk when nothing is asked for; `vocabulary` is this device's part of it."""
    least, most = CHUNKS
    return min(max(LOGIT_BYTES // (4 * vocabulary) // 128 * 128, least), most)


def refuse(spec, shapes, dtypes, device_kind):
    """Runs everywhere."""
    return None


class Statistics(NamedTuple):
    """One chunk's logits (this device's slice of the vocabulary) and what the whole vocabulary says about each token."""

    logits_CV: jax.Array
    lse_C: jax.Array
    nll_C: jax.Array
    loss_C: jax.Array
    counts_C: jax.Array
    is_label_CV: jax.Array


def _statistics(x_CD, w_DV, labels_C, weights_C, spec: LossSpec) -> Statistics:
    vocabulary, V = spec.vocabulary, w_DV.shape[1]
    logits = jnp.dot(x_CD, w_DV, preferred_element_type=jnp.float32)
    if spec.softcap is not None:
        logits = spec.softcap * jnp.tanh(logits / spec.softcap)
    top = vocabulary.max(logits.max(-1))
    lse = top + jnp.log(vocabulary.sum(jnp.exp(logits - top[:, None]).sum(-1)))
    is_label = jnp.arange(V, dtype=jnp.int32)[None, :] == (labels_C - vocabulary.index() * V)[:, None]
    at_label = vocabulary.sum(jnp.where(is_label, logits, 0).sum(-1))
    counts, valid = weights_C != 0, (labels_C >= 0) & (labels_C < V * vocabulary.shards)
    nll = jnp.where(valid, lse - at_label, jnp.nan)
    loss = (1 - spec.label_smoothing) * nll
    if spec.label_smoothing:
        loss = loss + spec.label_smoothing * (lse - vocabulary.sum(logits.sum(-1)) / (V * vocabulary.shards))
    if spec.z_loss:
        loss = loss + spec.z_loss * lse**2
    return Statistics(logits, lse, jnp.where(counts, nll, 0), jnp.where(counts, loss, 0), counts, is_label)


def _correct(logits_CV, labels_C, counts_C, spec: LossSpec) -> jax.Array:
    """Whether the label is the first of the largest logits."""
    vocabulary, V = spec.vocabulary, logits_CV.shape[1]
    top = logits_CV.max(-1)
    first = jnp.argmax(logits_CV, -1).astype(jnp.int32) + vocabulary.index() * V
    first = vocabulary.min(jnp.where(top == vocabulary.max(top), first, V * vocabulary.shards))
    return counts_C & (first == labels_C)


def _gradient(x_CD, w_DV, found: Statistics, loss_C, nll_C, spec: LossSpec) -> tuple[jax.Array, jax.Array]:
    """(dx_CD, dw_DV) fp32 of sum(loss_C * loss + nll_C * nll), given those two cotangents."""
    loss_C, nll_C = jnp.where(found.counts_C, loss_C, 0), jnp.where(found.counts_C, nll_C, 0)
    vocabulary_size = w_DV.shape[1] * spec.vocabulary.shards
    on_softmax = loss_C * (1 + 2 * spec.z_loss * found.lse_C) + nll_C
    on_label = (1 - spec.label_smoothing) * loss_C + nll_C
    d = on_softmax[:, None] * jnp.exp(found.logits_CV - found.lse_C[:, None]) - jnp.where(found.is_label_CV, on_label[:, None], 0)
    if spec.label_smoothing:
        d = d - (spec.label_smoothing / vocabulary_size * loss_C)[:, None]
    if spec.softcap is not None:
        d = d * (1 - (found.logits_CV / spec.softcap) ** 2)
    d = d.astype(x_CD.dtype)
    dot = lambda a, b, dims: lax.dot_general(a, b, (dims, ((), ())), preferred_element_type=jnp.float32)
    return dot(d, w_DV, ((1,), (1,))), dot(x_CD, d, ((0,), (0,)))


def _over_chunks(body, carry, tokens, w_DV, spec: LossSpec):
    """Scans `body(carry, chunk)` over chunks of (arrays B S ..., fill 0), and puts the results B S ... together again."""
    B, S = tokens[0].shape[:2]
    n = -(-B * S // (spec.chunk or default_chunk(w_DV.shape[1])))
    C = -(-B * S // n)

    def split(x):
        x = x.reshape(B * S, *x.shape[2:])
        return jnp.pad(x, [(0, n * C - B * S)] + [(0, 0)] * (x.ndim - 1)).reshape(n, C, *x.shape[1:])

    carry, out = lax.scan(body, carry, tuple(split(x) for x in tokens))
    join = lambda x: x.reshape(n * C, *x.shape[2:])[: B * S].reshape(B, S, *x.shape[2:])
    return carry, jax.tree.map(join, out)


def losses(x_BSD, w_DV, labels_BS, weights_BS, *, spec):
    """See `lcx.ops.linear_cross_entropy`, "Backends"."""
    if spec.per_token:
        return _each(spec, x_BSD, w_DV, labels_BS, weights_BS)
    return _total(spec, x_BSD, w_DV, labels_BS, weights_BS), None, None


def _no_gradient(labels_BS):
    return np.zeros(labels_BS.shape, jax.dtypes.float0)


# The sum alone: gradients are made in the forward rule.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(spec, x_BSD, w_DV, labels_BS, weights_BS):
    w = w_DV.astype(x_BSD.dtype)

    def body(total, chunk):
        x_CD, labels_C, weights_C = chunk
        return total + (weights_C * _statistics(x_CD, w, labels_C, weights_C, spec).loss_C).sum(), None

    return _over_chunks(body, jnp.float32(0), (x_BSD, labels_BS, weights_BS), w, spec)[0]


def _total_forward(spec, x_BSD, w_DV, labels_BS, weights_BS):
    w = w_DV.astype(x_BSD.dtype)

    def body(sums, chunk):
        total, dw = sums
        x_CD, labels_C, weights_C = chunk
        found = _statistics(x_CD, w, labels_C, weights_C, spec)
        dx, dw_chunk = _gradient(x_CD, w, found, weights_C, jnp.zeros_like(weights_C), spec)
        return (total + (weights_C * found.loss_C).sum(), dw + dw_chunk), (dx.astype(x_CD.dtype), found.loss_C)

    start = jnp.float32(0), jnp.zeros(w_DV.shape, jnp.float32)
    (total, dw), (dx, loss_BS) = _over_chunks(body, start, (x_BSD, labels_BS, weights_BS), w, spec)
    return total, (dx, dw.astype(w_DV.dtype), labels_BS, loss_BS)


def _total_backward(spec, residuals, cotangent):
    dx, dw, labels_BS, loss_BS = residuals
    # dx and dw were made from statistics that every slice of the vocabulary contributed to, dweights from this device's copy.
    shared = spec.vocabulary.sum(cotangent)
    scaled = lambda x: (x.astype(jnp.float32) * shared).astype(x.dtype)
    return scaled(dx), scaled(dw), _no_gradient(labels_BS), loss_BS * cotangent


_total.defvjp(_total_forward, _total_backward)


# The sum and the losses per token: the backward pass computes the logits again.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _each(spec, x_BSD, w_DV, labels_BS, weights_BS):
    return _each_forward(spec, x_BSD, w_DV, labels_BS, weights_BS)[0]


def _each_forward(spec, x_BSD, w_DV, labels_BS, weights_BS):
    w = w_DV.astype(x_BSD.dtype)

    def body(total, chunk):
        x_CD, labels_C, weights_C = chunk
        found = _statistics(x_CD, w, labels_C, weights_C, spec)
        correct_C = _correct(found.logits_CV, labels_C, found.counts_C, spec)
        return total + (weights_C * found.loss_C).sum(), (found.nll_C, correct_C, found.loss_C)

    total, (nll_BS, correct_BS, loss_BS) = _over_chunks(body, jnp.float32(0), (x_BSD, labels_BS, weights_BS), w, spec)
    return (total, nll_BS, correct_BS), (x_BSD, w_DV, labels_BS, weights_BS, loss_BS)


def _each_backward(spec, residuals, cotangents):
    x_BSD, w_DV, labels_BS, weights_BS, loss_BS = residuals
    on_total, on_nll_BS, _ = cotangents
    w, shared, on_nll_BS = w_DV.astype(x_BSD.dtype), spec.vocabulary.sum(on_total), spec.vocabulary.sum(on_nll_BS)

    def body(dw, chunk):
        x_CD, labels_C, weights_C, on_nll_C = chunk
        found = _statistics(x_CD, w, labels_C, weights_C, spec)
        dx, dw_chunk = _gradient(x_CD, w, found, weights_C * shared, on_nll_C, spec)
        return dw + dw_chunk, dx.astype(x_CD.dtype)

    start = jnp.zeros(w_DV.shape, jnp.float32)
    dw, dx = _over_chunks(body, start, (x_BSD, labels_BS, weights_BS, on_nll_BS), w, spec)
    return dx, dw.astype(w_DV.dtype), _no_gradient(labels_BS), loss_BS * on_total


_each.defvjp(_each_forward, _each_backward)
