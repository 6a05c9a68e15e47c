"""Softmax attention on one device: one meaning, one custom VJP, any backend.

Backends. A backend is a module (`pallas_kernels.KERNELS["attention"]`) of three functions:

    refuse(spec, shapes, dtypes, device_kind) -> why it cannot run, or None. `shapes` and `dtypes` hold q, k, v and, where
        they were given, order_q and order_k (arrays only), segments_q_BS, segments_k_BT, sink_BT, alibi_slopes_H.
    forward(q_BSHK, k_BTGK, v_BTGK, *, spec, order_q, order_k, segments, alibi_slopes_H=None, carry=None)
        -> o_BSHK normalised, lse_BHS, both fp32; a row that sees no key has o = 0, lse = -inf. `carry` = (o, lse) is a
        partial over other keys to merge with.
    backward(q_BSHK, k_BTGK, v_BTGK, do_BSHK, lse_BHS, delta_BHS, *, spec, order_q, order_k, segments, alibi_slopes_H=None)
        -> dq_BSHK, dk_BTGK, dv_BTGK, all fp32, with weights exp(score - lse). `lse` may be over more keys than are here; a
        row with lse = -inf contributes nothing. delta = sum_K(do * o) - dlse.

Sequence-parallel attention calls the pair itself, under a logsumexp over all devices' keys.

A module that computes whole attention only (a vendor's kernel, whose backward pass takes no logsumexp from outside) has instead
of the pair

    whole(q_BSHK, k_BTGK, v_BTGK, *, spec) -> o_BSHK in q's dtype, differentiable by JAX

and refuses what is not `spec.whole`, document ids, sink tokens and ALiBi slopes.
"""

import functools
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from lcx.ops import dispatch
from lcx.ops.partials import add_sink
from lcx.ops.types import AttentionSpec, Mask, Runs, Segments, contiguous
from lcx.ops.visibility import leading_tokens_BT
from lcx.registry import UserError, load
from pallas_kernels import KERNELS


def attention_backend(implementation: str, spec: AttentionSpec, q: Any, k: Any, v: Any, **others: Any) -> ModuleType:
    """The backend module that carries out attention on arrays like these.

    Args:
      implementation: a name from the table, or "auto".
      spec: mask, scale, soft-cap.
      q, k, v: arrays or shapes with dtypes.
      **others: further arguments by name, as `refuse` receives them; those that are None or `Runs` are left out.

    Raises:
      UserError: see `dispatch.choose`.
    """
    given = dict(q=q, k=k, v=v) | {name: x for name, x in others.items() if x is not None and not isinstance(x, Runs)}
    shapes, dtypes = ({name: getattr(x, what) for name, x in given.items()} for what in ("shape", "dtype"))
    return dispatch.choose("attention", implementation, spec=spec, shapes=shapes, dtypes=dtypes)


def computes_whole(implementation: str) -> bool:
    """Whether an implementation, by name, computes whole attention and nothing else."""
    table = KERNELS["attention"]
    return implementation in table and hasattr(load(table, implementation, field="implementation"), "whole")


def attention(
    q_BSHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    *,
    mask: Mask,
    order_q: Runs | jax.Array | None = None,
    order_k: Runs | jax.Array | None = None,
    segments_q_BS: jax.Array | None = None,
    segments_k_BT: jax.Array | None = None,
    sink_BT: jax.Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes_H: jax.Array | None = None,
    sink_logits_H: jax.Array | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """softmax(score) v, where score = softcap(scale q.k) - alibi_slope |i - j|, over the keys that `mask` lets a query see.

    H query heads share G key/value heads: head h reads group h // (H // G). A query that sees no key, padding included,
    gives 0 and passes no gradient. Statistics are fp32; products of bf16 operands accumulate in fp32.

    Args:
      q_BSHK, k_BTGK, v_BTGK: queries, keys and values of one floating dtype.
      mask: visibility, in terms of order and documents.
      order_q, order_k: index in the row of each query and key; None is arange. int32 arrays are for the reference only.
      segments_q_BS, segments_k_BT: int document ids, 0 for padding, non-decreasing in order; both or neither.
      sink_BT: bool, which keys are among the first `mask.sink_tokens` of their document. None computes it from the keys,
        which must then be whole rows; code that holds a slice of a row has to say.
      scale: factor on q.k; None is K ** -0.5.
      softcap: None, or c for c * tanh(score / c), applied before the bias (Gemma 2).
      alibi_slopes_H: bias -slope * |i - j| on order, after the soft-cap (Press et al. 2022). Not differentiated.
      sink_logits_H: learned logit per head that joins the denominator of every row, with value 0 (gpt-oss).
      return_lse: also return the logsumexp of each row's scores, differentiable, and o in fp32.
      implementation: a name from `pallas_kernels.KERNELS["attention"]`, or "auto".

    Returns:
      o_BSHK in q's dtype; with `return_lse`, (o_BSHK, lse_BHS) in fp32.

    Raises:
      UserError: arguments that do not fit together, or an implementation that cannot run.
    """
    given = dict(segments_q_BS=segments_q_BS, segments_k_BT=segments_k_BT, sink_BT=sink_BT, alibi_slopes_H=alibi_slopes_H)
    _check(q_BSHK, k_BTGK, v_BTGK, mask, order_q, order_k, scale, softcap, sink_logits_H, **given)
    segments_q_BS, segments_k_BT = (None if x is None else jnp.asarray(x, jnp.int32) for x in (segments_q_BS, segments_k_BT))
    (B, S, _, K), T = q_BSHK.shape, k_BTGK.shape[1]
    whole = order_q is None and order_k is None and sink_logits_H is None and not return_lse
    scale, softcap = K**-0.5 if scale is None else float(scale), None if softcap is None else float(softcap)
    spec = AttentionSpec(mask, scale, softcap, whole)
    order_q = contiguous(S) if order_q is None else order_q
    order_k = contiguous(T) if order_k is None else order_k
    if mask.sink_tokens and mask.window is not None and sink_BT is None:
        sink_BT = leading_tokens_BT(mask.sink_tokens, order_k.order() if isinstance(order_k, Runs) else order_k, segments_k_BT, B)
        given["sink_BT"] = sink_BT
    backend = attention_backend(implementation, spec, q_BSHK, k_BTGK, v_BTGK, order_q=order_q, order_k=order_k, **given)
    if hasattr(backend, "whole"):
        return backend.whole(q_BSHK, k_BTGK, v_BTGK, spec=spec)
    slopes_H = None if alibi_slopes_H is None else jax.lax.stop_gradient(alibi_slopes_H)
    tokens = _Tokens(order_q, order_k, Segments(segments_q_BS, segments_k_BT, sink_BT))
    dtype = jnp.float32 if return_lse or sink_logits_H is not None else q_BSHK.dtype
    o_BSHK, lse_BHS = _attend(backend, spec, dtype, q_BSHK, k_BTGK, v_BTGK, slopes_H, tokens)
    if sink_logits_H is not None:
        o_BSHK, lse_BHS = add_sink(o_BSHK, lse_BHS, sink_logits_H)
    return (o_BSHK, lse_BHS) if return_lse else o_BSHK.astype(q_BSHK.dtype)


class _Tokens(NamedTuple):
    """What is known about the tokens; integers, without gradient."""

    order_q: Runs | jax.Array
    order_k: Runs | jax.Array
    segments: Segments


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(backend, spec, dtype, q, k, v, slopes_H, tokens):
    return _attend_forward(backend, spec, dtype, q, k, v, slopes_H, tokens)[0]


def _attend_forward(backend, spec, dtype, q, k, v, slopes_H, tokens):
    o, lse = backend.forward(q, k, v, spec=spec, **tokens._asdict(), alibi_slopes_H=slopes_H)
    # Named here, among the residuals, so that a remat policy can save them and the forward pass is not run again.
    o, lse = checkpoint_name(o.astype(dtype), "attention_out"), checkpoint_name(lse, "attention_lse")
    return (o, lse), (q, k, v, slopes_H, tokens, o, lse)


def _attend_backward(backend, spec, dtype, residuals, cotangents):
    q, k, v, slopes_H, tokens, o, lse = residuals
    do, dlse = cotangents
    delta = jnp.einsum("bshk,bshk->bhs", do.astype(jnp.float32), o.astype(jnp.float32)) - dlse
    delta = jnp.where(lse == -jnp.inf, 0.0, delta)
    dq, dk, dv = backend.backward(q, k, v, do, lse, delta, spec=spec, **tokens._asdict(), alibi_slopes_H=slopes_H)
    none = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), tokens)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), jax.tree.map(jnp.zeros_like, slopes_H), none


_attend.defvjp(_attend_forward, _attend_backward)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(f"attention: {message}")


def _check(
    q, k, v, mask, order_q, order_k, scale, softcap, sink_logits_H, *, segments_q_BS, segments_k_BT, sink_BT, alibi_slopes_H
):
    """Raises a one-line UserError for arguments that do not fit together."""
    for name, x in (("q_BSHK", q), ("k_BTGK", k), ("v_BTGK", v)):
        _require(x.ndim == 4, f"{name} has shape {x.shape}; it needs 4 dims, {', '.join(name[2:])}")
        _require(jnp.issubdtype(x.dtype, jnp.floating), f"{name} has dtype {x.dtype}; it needs a floating one")
        _require(x.dtype == q.dtype, f"{name} has dtype {x.dtype} and q_BSHK {q.dtype}; they need the same")
    (B, S, H, K), (_, T, G, _) = q.shape, k.shape
    _require(k.shape == (B, T, G, K), f"k_BTGK has shape {k.shape}; with q_BSHK {q.shape} it needs B={B}, K={K}")
    _require(v.shape == k.shape, f"v_BTGK has shape {v.shape} and k_BTGK {k.shape}; they need the same")
    _require(G > 0 and H % G == 0, f"H={H} query heads cannot be divided among G={G} key/value heads")
    _require(S > 0 and T > 0, f"q_BSHK has S={S} tokens and k_BTGK T={T}; both need at least 1")
    _require(isinstance(mask, Mask), f"mask={mask!r} needs to be an lcx.ops.Mask")
    for name, order, length in (("order_q", order_q, S), ("order_k", order_k, T)):
        if isinstance(order, Runs):
            _require(order.size == length, f"{name} describes {order.size} tokens and there are {length}")
        elif order is not None:
            shape = getattr(order, "shape", order)
            is_order = shape == (length,) and jnp.issubdtype(order.dtype, jnp.integer)
            _require(is_order, f"{name}={shape} needs to be None, lcx.ops.Runs or an int array of shape ({length},)")
    missing = "segments_k_BT" if segments_k_BT is None else "segments_q_BS"
    both = (segments_q_BS is None) == (segments_k_BT is None)
    _require(both, f"{missing} is missing; give document ids for queries and keys, or for neither")
    for name, x, shape in (("segments_q_BS", segments_q_BS, (B, S)), ("segments_k_BT", segments_k_BT, (B, T))):
        if x is not None:
            is_ids = x.shape == shape and jnp.issubdtype(x.dtype, jnp.integer)
            _require(is_ids, f"{name} is {x.dtype}{x.shape}; it needs int{shape}")
    if sink_BT is not None:
        is_flags = sink_BT.shape == (B, T) and sink_BT.dtype == bool
        _require(is_flags, f"sink_BT is {sink_BT.dtype}{sink_BT.shape}; it needs bool{(B, T)}")
        _require(mask.sink_tokens > 0, "sink_BT is given but mask.sink_tokens=0")
    for name, x in (("alibi_slopes_H", alibi_slopes_H), ("sink_logits_H", sink_logits_H)):
        if x is not None:
            _require(x.shape == (H,), f"{name} has shape {x.shape}; it needs ({H},), one entry per query head")
    for name, x in (("scale", scale), ("softcap", softcap)):
        is_number = x is None or (isinstance(x, int | float | np.number) and x > 0)
        _require(is_number, f"{name}={x!r} needs to be None or a static number above 0")
