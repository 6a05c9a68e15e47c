"""The selective scan by its definition, one token after another, fp32. The oracle for every other implementation."""

import jax
import jax.numpy as jnp
from jax import lax

from lcx.ops.recurrence import Affine, elapsed, step_sizes

TOKENS_LIMIT = 16_384


def refuse(spec, shapes, dtypes, device_kind):
    """Refuses long sequences: its gradient keeps every state."""
    S = shapes["u_BSE"][1]
    return f"its gradient keeps every state and it takes at most {TOKENS_LIMIT} tokens, not {S}" if S > TOKENS_LIMIT else None


def _dt_BSE(inputs, spec):
    real_BS = None if inputs.marks is None else inputs.marks.real_BS
    return step_sizes(inputs.dt_BSE, inputs.dt_bias_E, spec.dt_softplus, real_BS)


def forward(inputs, initial_state_BEN, *, spec):
    """See `lcx.ops.selective_scan`, "Backends"."""
    u, A, B, C, D = (inputs[i].astype(jnp.float32) for i in (0, 2, 3, 4, 5))
    reset_BS = jnp.zeros(u.shape[:2], bool) if inputs.marks is None else inputs.marks.reset_BS

    def token(h_BEN, at):
        u_BE, dt_BE, B_BN, C_BN, reset_B = at
        h_BEN = jnp.where(reset_B[:, None, None], 0, h_BEN)
        h_BEN = jnp.exp(dt_BE[:, :, None] * A[None]) * h_BEN + (dt_BE * u_BE)[:, :, None] * B_BN[:, None]
        return h_BEN, (h_BEN * C_BN[:, None]).sum(-1)

    tokens = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (u, _dt_BSE(inputs, spec), B, C, reset_BS))
    final_state_BEN, y_SBE = lax.scan(token, initial_state_BEN, tokens)
    y = jnp.swapaxes(y_SBE, 0, 1) + D[None, None] * u
    if inputs.z_BSE is not None:
        y = y * jax.nn.silu(inputs.z_BSE.astype(jnp.float32))
    if inputs.marks is not None:
        y = jnp.where(inputs.marks.real_BS[..., None], y, 0)
    return y.astype(inputs.u_BSE.dtype), final_state_BEN, initial_state_BEN


def backward(inputs, residuals, dy_BSE, dfinal_state_BEN, *, spec):
    """See `lcx.ops.selective_scan`, "Backends"."""
    arrays, marked = inputs._replace(marks=None), inputs.marks
    run = lambda arrays, initial: forward(arrays._replace(marks=marked), initial, spec=spec)[:2]
    return jax.vjp(run, arrays, residuals)[1]((dy_BSE, dfinal_state_BEN))


def summary(inputs, *, spec):
    """See `lcx.ops.selective_scan`, "Backends"."""
    zero = jnp.zeros((inputs.u_BSE.shape[0], *inputs.A_EN.shape), jnp.float32)
    return Affine(elapsed(_dt_BSE(inputs, spec), inputs.marks)[..., None], forward(inputs, zero, spec=spec)[1])


def reverse_summary(inputs, dy_BSE, *, spec):
    """See `lcx.ops.selective_scan`, "Backends"."""
    zero = jnp.zeros((inputs.u_BSE.shape[0], *inputs.A_EN.shape), jnp.float32)
    return Affine(elapsed(_dt_BSE(inputs, spec), inputs.marks)[..., None], backward(inputs, zero, dy_BSE, zero, spec=spec)[1])
