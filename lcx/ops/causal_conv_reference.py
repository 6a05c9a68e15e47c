"""The causal convolution by its definition, one tap after another, fp32. The oracle for every other implementation."""

import jax
import jax.numpy as jnp


def refuse(spec, shapes, dtypes, device_kind):
    """Refuses nothing."""
    return None


def forward(inputs, *, spec):
    """See `lcx.ops.causal_conv`, "Backends"."""
    x_BSE, w_EW, bias_E, initial_BWE, segments_BS = inputs
    S, W = x_BSE.shape[1], w_EW.shape[1]
    segments_BS = jnp.ones(x_BSE.shape[:2], jnp.int32) if segments_BS is None else segments_BS
    real_BS1 = (segments_BS != 0)[..., None]
    x_BTE = jnp.concatenate([initial_BWE, jnp.where(real_BS1, x_BSE, 0)], axis=1).astype(jnp.float32)
    segments_BT = jnp.concatenate([jnp.repeat(segments_BS[:, :1], W - 1, axis=1), segments_BS], axis=1)
    y_BSE = jnp.broadcast_to(bias_E.astype(jnp.float32), x_BSE.shape)
    for i in range(W):
        tap_BSE = jnp.where((segments_BT[:, i : i + S] == segments_BS)[..., None], x_BTE[:, i : i + S], 0)
        y_BSE += w_EW[:, i].astype(jnp.float32)[None, None] * tap_BSE
    if spec.activation == "silu":
        y_BSE = jax.nn.silu(y_BSE)
    return jnp.where(real_BS1, y_BSE, 0).astype(x_BSE.dtype)


def backward(inputs, dy_BSE, *, spec):
    """See `lcx.ops.causal_conv`, "Backends"."""
    arrays, segments_BS = inputs._replace(segments_BS=None), inputs.segments_BS
    run = lambda arrays: forward(arrays._replace(segments_BS=segments_BS), spec=spec)
    return jax.vjp(run, arrays)[1](dy_BSE)[0]
