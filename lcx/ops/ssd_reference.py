"""State-space duality by its definition, one token after another, fp32. The oracle for every other implementation."""

import jax
import jax.numpy as jnp
from jax import lax

from lcx.ops.recurrence import Affine, elapsed
from lcx.ops.ssd import steps_BSH

TOKENS_LIMIT = 16_384


def refuse(spec, shapes, dtypes, device_kind):
    """Refuses long sequences: its gradient keeps every state."""
    S = shapes["x_BSHK"][1]
    return f"its gradient keeps every state and it takes at most {TOKENS_LIMIT} tokens, not {S}" if S > TOKENS_LIMIT else None


def forward(inputs, initial_state_BHKN, *, spec):
    """See `lcx.ops.ssd`, "Backends"."""
    x, A, B, C, D = (inputs[i].astype(jnp.float32) for i in (0, 2, 3, 4, 5))
    reset_BS = jnp.zeros(x.shape[:2], bool) if inputs.marks is None else inputs.marks.reset_BS
    R = x.shape[2] // B.shape[2]

    def token(h_BHKN, at):
        x_BHK, dt_BH, B_BGN, C_BGN, reset_B = at
        B_BHN, C_BHN = jnp.repeat(B_BGN, R, axis=1), jnp.repeat(C_BGN, R, axis=1)
        a_BH = jnp.where(reset_B[:, None], 0, jnp.exp(dt_BH * A[None]))
        h_BHKN = a_BH[..., None, None] * h_BHKN + (dt_BH[..., None] * x_BHK)[..., None] * B_BHN[:, :, None]
        return h_BHKN, (h_BHKN * C_BHN[:, :, None]).sum(-1)

    tokens = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (x, steps_BSH(inputs, spec), B, C, reset_BS))
    final_state_BHKN, y_SBHK = lax.scan(token, initial_state_BHKN, tokens)
    y = jnp.swapaxes(y_SBHK, 0, 1) + D[None, None, :, None] * x
    if inputs.marks is not None:
        y = jnp.where(inputs.marks.real_BS[..., None, None], y, 0)
    return y.astype(inputs.x_BSHK.dtype), final_state_BHKN, initial_state_BHKN


def backward(inputs, residuals, dy_BSHK, dfinal_state_BHKN, *, spec):
    """See `lcx.ops.ssd`, "Backends"."""
    arrays, marked = inputs._replace(marks=None), inputs.marks
    run = lambda arrays, initial: forward(arrays._replace(marks=marked), initial, spec=spec)[:2]
    return jax.vjp(run, arrays, residuals)[1]((dy_BSHK, dfinal_state_BHKN))


def _zero_BHKN(inputs):
    B, _, H, K = inputs.x_BSHK.shape
    return jnp.zeros((B, H, K, inputs.B_BSGN.shape[3]), jnp.float32)


def _elapsed_BH11(inputs, spec):
    return elapsed(steps_BSH(inputs, spec), inputs.marks)[..., None, None]


def summary(inputs, *, spec):
    """See `lcx.ops.ssd`, "Backends"."""
    return Affine(_elapsed_BH11(inputs, spec), forward(inputs, _zero_BHKN(inputs), spec=spec)[1])


def reverse_summary(inputs, dy_BSHK, *, spec):
    """See `lcx.ops.ssd`, "Backends"."""
    zero = _zero_BHKN(inputs)
    return Affine(_elapsed_BH11(inputs, spec), backward(inputs, zero, dy_BSHK, zero, spec=spec)[1])
