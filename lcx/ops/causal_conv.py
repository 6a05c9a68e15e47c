"""The short depthwise causal convolution in front of a recurrence, on one device."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcx.registry import UserError, unknown

ACTIVATIONS = ("silu",)


def causal_conv(
    x_BSE: jax.Array,
    w_EW: jax.Array,
    bias_E: jax.Array | None = None,
    *,
    segments_BS: jax.Array | None = None,
    initial_BWE: jax.Array | None = None,
    activation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """y_t = activation(bias + sum_i w[:, i] x_{t - W + 1 + i}), i < W; fp32 inside. Gu and Dao, "Mamba" (2023), section 3.4.

    Inputs of another document and of padding count as zero; at padding y is 0 and passes no gradient. Kept for the backward pass
    are the arguments only.

    Args:
      x_BSE: inputs, floating.
      w_EW: weights; the last column is that of the token itself.
      bias_E: None is 0.
      segments_BS: int document ids, 0 for padding; None for one document a row.
      initial_BWE: the W - 1 inputs in front of token 0 (one less than the letter says), oldest first; None is zeros. They belong
        to the document of token 0 and reach no other: whoever passes rows of another document zeroes them. Differentiable.
      activation: None or "silu".

    Returns:
      y_BSE in x's dtype; final_BWE in x's dtype, differentiable: the `initial_BWE` of what comes next. Rows that are not of the
      last token's document are 0, so that a continuation need only compare that document with its own.

    Raises:
      UserError: arguments that do not fit together.
    """
    check(x_BSE, w_EW, bias_E, segments_BS, initial_BWE, activation)
    (B, S, E), W = x_BSE.shape, w_EW.shape[1]
    if initial_BWE is None:
        initial_BWE = jnp.zeros((B, W - 1, E), x_BSE.dtype)
    x_BTE = jnp.concatenate([initial_BWE.astype(x_BSE.dtype), x_BSE], axis=1)
    segments_BT = None
    if segments_BS is not None:
        segments_BT = jnp.concatenate([jnp.broadcast_to(segments_BS[:, :1], (B, W - 1)), segments_BS], axis=1)
    bias_E = jnp.zeros(E, jnp.float32) if bias_E is None else bias_E
    y_BSE = _convolve(activation, x_BTE, w_EW, bias_E, segments_BT)
    final_BWE = x_BTE[:, S:]
    if segments_BT is not None:
        same = (segments_BT[:, S:] == segments_BT[:, -1:]) & (segments_BT[:, S:] != 0)
        final_BWE = jnp.where(same[..., None], final_BWE, 0)
    return y_BSE, final_BWE


def _taps(x_BTE, segments_BT, W):
    """What each column of the weights multiplies: W arrays B S E, fp32."""
    S = x_BTE.shape[1] - W + 1
    for i in range(W):
        x = x_BTE[:, i : i + S].astype(jnp.float32)
        yield x if segments_BT is None else jnp.where(_sees(segments_BT, i, W), x, 0)


def _sees(segments_BT, i, W):
    """Whether each token and its tap i are of one document; B S 1."""
    own = segments_BT[:, W - 1 :]
    return ((segments_BT[:, i : i + own.shape[1]] == own) & (own != 0))[..., None]


def _before_activation(x_BTE, w_EW, bias_E, segments_BT):
    w, b = w_EW.astype(jnp.float32), bias_E.astype(jnp.float32)
    return sum((w[:, i][None, None] * x for i, x in enumerate(_taps(x_BTE, segments_BT, w.shape[1]))), b[None, None])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(activation, x_BTE, w_EW, bias_E, segments_BT):
    y = _before_activation(x_BTE, w_EW, bias_E, segments_BT)
    y = jax.nn.silu(y) if activation == "silu" else y
    if segments_BT is not None:
        y = jnp.where((segments_BT[:, w_EW.shape[1] - 1 :] != 0)[..., None], y, 0)
    return y.astype(x_BTE.dtype)


def _forward(activation, *arrays):
    return _convolve(activation, *arrays), arrays


def _backward(activation, arrays, dy_BSE):
    x_BTE, w_EW, bias_E, segments_BT = arrays
    S, W, w, dy = dy_BSE.shape[1], w_EW.shape[1], w_EW.astype(jnp.float32), dy_BSE.astype(jnp.float32)
    if activation == "silu":
        before = _before_activation(x_BTE, w_EW, bias_E, segments_BT)
        gate = jax.nn.sigmoid(before)
        dy = dy * gate * (1 + before * (1 - gate))
    if segments_BT is not None:
        dy = jnp.where((segments_BT[:, W - 1 :] != 0)[..., None], dy, 0)
    # One array between two loops, rounded to dy's dtype as dx is. Left to itself XLA writes the products of every tap in fp32 and
    # adds them up in a third loop: on TPU 23 times the size of x moves where so it is 6 (pallas_kernels/README.md).
    kept = jax.lax.optimization_barrier(dy.astype(dy_BSE.dtype))
    sum_tokens = lambda x_BSE: x_BSE.sum((0, 1))
    dy = kept.astype(jnp.float32)
    dw = jnp.stack([sum_tokens(dy * x) for x in _taps(x_BTE, segments_BT, W)], axis=1)
    zeros = lambda x: jnp.zeros_like(x, shape=(x.shape[0], W - 1, *x.shape[2:]))
    behind = lambda x: None if x is None else jnp.concatenate([x, zeros(x)], axis=1)
    later, owners = behind(kept), behind(segments_BT)
    first = jnp.concatenate([zeros(later), later[:, : W - 1]], axis=1)
    dinitial = _to_inputs(first, w, owners, W - 1)
    dx = _to_inputs(later, w, None if owners is None else owners[:, W - 1 :], S)
    dx = jnp.concatenate([x.astype(x_BTE.dtype) for x in (dinitial, dx)], axis=1)
    no_gradient = None if segments_BT is None else np.zeros(segments_BT.shape, jax.dtypes.float0)
    return dx, dw.astype(w_EW.dtype), sum_tokens(dy).astype(bias_E.dtype), no_gradient


def _to_inputs(dy_BTE, w, owners_BT, count):
    """Gradients of `count` inputs, fp32: from the one at its place and the W - 1 behind, of which it is an earlier tap."""
    total = 0.0
    for i in range(w.shape[1]):
        at = slice(w.shape[1] - 1 - i, w.shape[1] - 1 - i + count)
        part = w[:, i][None, None] * dy_BTE[:, at].astype(jnp.float32)
        same = None if owners_BT is None else (owners_BT[:, at] == owners_BT[:, :count])[..., None]
        total += part if same is None else jnp.where(same, part, 0)
    return total


_convolve.defvjp(_forward, _backward)


def check(x_BSE: Any, w_EW: Any, bias_E: Any, segments_BS: Any, initial_BWE: Any, activation: Any) -> None:
    """Raises a one-line UserError for arguments that do not fit together."""

    def require(holds, message):
        if not holds:
            raise UserError(f"causal_conv: {message}")

    require(x_BSE.ndim == 3, f"x_BSE has shape {x_BSE.shape}; it needs 3 dims, B, S, E")
    (B, S, E) = x_BSE.shape
    require(S > 0, f"x_BSE has S={S} tokens; it needs at least 1")
    W = w_EW.shape[-1] if w_EW.ndim else 0
    require(w_EW.shape == (E, W) and W > 0, f"w_EW has shape {w_EW.shape}; with x_BSE {x_BSE.shape} it needs E={E} and W >= 1")
    needed = dict(x_BSE=(x_BSE, x_BSE.shape), w_EW=(w_EW, w_EW.shape), bias_E=(bias_E, (E,)))
    for name, (x, shape) in (needed | dict(initial_BWE=(initial_BWE, (B, W - 1, E)))).items():
        if x is not None:
            require(x.shape == shape, f"{name} has shape {x.shape}; with x_BSE {x_BSE.shape} and W={W} it needs {shape}")
            require(jnp.issubdtype(x.dtype, jnp.floating), f"{name} has dtype {x.dtype}; it needs a floating one")
    if segments_BS is not None:
        is_ids = segments_BS.shape == (B, S) and jnp.issubdtype(segments_BS.dtype, jnp.integer)
        require(is_ids, f"segments_BS is {segments_BS.dtype}{segments_BS.shape}; it needs int{(B, S)}")
    if activation is not None and activation not in ACTIVATIONS:
        raise unknown("causal_conv: activation", activation, ACTIVATIONS)
