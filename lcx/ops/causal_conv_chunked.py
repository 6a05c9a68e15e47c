"""The causal convolution in plain jnp, written so that XLA moves little memory. Every platform, any sizes.

Nothing is cut into chunks: the name is the one that every operation's portable implementation has.
"""

import jax
import jax.numpy as jnp


def refuse(spec, shapes, dtypes, device_kind):
    """Refuses nothing."""
    return None


def forward(inputs, *, spec):
    """See `lcx.ops.causal_conv`, "Backends"."""
    x_BTE, segments_BT = _with_initial(inputs)
    y = _before_activation(x_BTE, segments_BT, inputs)
    y = jax.nn.silu(y) if spec.activation == "silu" else y
    if inputs.segments_BS is not None:
        y = jnp.where((inputs.segments_BS != 0)[..., None], y, 0)
    return y.astype(inputs.x_BSE.dtype)


def backward(inputs, dy_BSE, *, spec):
    """See `lcx.ops.causal_conv`, "Backends"."""
    x_BTE, segments_BT = _with_initial(inputs)
    S, W, w, dy = dy_BSE.shape[1], inputs.w_EW.shape[1], inputs.w_EW.astype(jnp.float32), dy_BSE.astype(jnp.float32)
    if spec.activation == "silu":
        before = _before_activation(x_BTE, segments_BT, inputs)
        gate = jax.nn.sigmoid(before)
        dy = dy * gate * (1 + before * (1 - gate))
    if segments_BT is not None:
        dy = jnp.where((inputs.segments_BS != 0)[..., None], dy, 0)
    # One array between two loops, rounded to dy's dtype as dx is. Left to itself XLA writes the products of every tap in fp32 and
    # adds them up in a third loop: on TPU 23 times the size of x moves where so it is 6 (pallas_kernels/README.md).
    kept = jax.lax.optimization_barrier(dy.astype(dy_BSE.dtype))
    sum_tokens = lambda x_BSE: x_BSE.sum((0, 1))
    dy = kept.astype(jnp.float32)
    dw = jnp.stack([sum_tokens(dy * x) for x in _taps(x_BTE, segments_BT, W)], axis=1)
    zeros = lambda x: jnp.zeros_like(x, shape=(x.shape[0], W - 1, *x.shape[2:]))
    behind = lambda x: None if x is None else jnp.concatenate([x, zeros(x)], axis=1)
    dx = _to_inputs(behind(kept), w, behind(inputs.segments_BS), S)
    return inputs._replace(
        x_BSE=dx.astype(inputs.x_BSE.dtype),
        w_EW=dw.astype(inputs.w_EW.dtype),
        bias_E=sum_tokens(dy).astype(inputs.bias_E.dtype),
        initial_BWE=None,
        segments_BS=None,
    )


def _with_initial(inputs):
    """Inputs and their documents with those in front of token 0, which are of its document."""
    x_BTE, segments_BT = jnp.concatenate([inputs.initial_BWE, inputs.x_BSE], axis=1), None
    if inputs.segments_BS is not None:
        first = jnp.broadcast_to(inputs.segments_BS[:, :1], inputs.initial_BWE.shape[:2])
        segments_BT = jnp.concatenate([first, inputs.segments_BS], axis=1)
    return x_BTE, segments_BT


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


def _before_activation(x_BTE, segments_BT, inputs):
    w, b = inputs.w_EW.astype(jnp.float32), inputs.bias_E.astype(jnp.float32)
    return sum((w[:, i][None, None] * x for i, x in enumerate(_taps(x_BTE, segments_BT, w.shape[1]))), b[None, None])


def _to_inputs(dy_BTE, w, owners_BT, count):
    """Gradients of `count` inputs, fp32: from the one at its place and the W - 1 behind, of which it is an earlier tap."""
    total = 0.0
    for i in range(w.shape[1]):
        at = slice(w.shape[1] - 1 - i, w.shape[1] - 1 - i + count)
        part = w[:, i][None, None] * dy_BTE[:, at].astype(jnp.float32)
        same = None if owners_BT is None else (owners_BT[:, at] == owners_BT[:, :count])[..., None]
        total += part if same is None else jnp.where(same, part, 0)
    return total
