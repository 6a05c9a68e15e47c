"""The selective scan (S6) on one device: one meaning, one custom VJP, any backend.

Backends. A backend is a module (`pallas_kernels.KERNELS["selective_scan"]`) of

    refuse(spec, shapes, dtypes, device_kind) -> why it cannot run, or None.
    forward(inputs, initial_state_BEN, *, spec) -> y_BSE in u's dtype, final_state_BEN fp32, residuals (a pytree of its own
        making, which besides the inputs is all that is kept for the backward pass).
    backward(inputs, residuals, dy_BSE, dfinal_state_BEN, *, spec) -> gradients (`Inputs`, in the dtypes of the inputs, marks
        None), dinitial_state_BEN fp32.
    summary(inputs, *, spec) -> `Affine`, elapsed_BE1 and state_BEN: what this stretch of tokens does to a state.
    reverse_summary(inputs, dy_BSE, *, spec) -> `Affine`: the same for the gradient of the state after the stretch.

Over a sequence that is cut across devices: `summary` on each, an exclusive prefix (`recurrence.compose`, rate
`rate_1EN(inputs)`) gives the initial states, then `forward`; backward the mirror image, with `reverse_summary`, from the last
device to the first, then `backward`. The summaries hold no outputs and no history, so such a pass costs about the exponentials.
Each device's `marks` are made with the segment to its left, so a document that starts at token 0 needs no further care.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lcx.ops.recurrence import Marks, marks
from lcx.ops.recurrence_backend import recurrence_backend, scan
from lcx.registry import UserError


@dataclasses.dataclass(frozen=True)
class ScanSpec:
    """What a backend needs to know statically. See `selective_scan` for the fields."""

    dt_softplus: bool = True


class Inputs(NamedTuple):
    """The arrays of a scan, as given by the user; or their gradients."""

    u_BSE: jax.Array
    dt_BSE: jax.Array
    A_EN: jax.Array
    B_BSN: jax.Array
    C_BSN: jax.Array
    D_E: jax.Array
    z_BSE: jax.Array | None = None
    dt_bias_E: jax.Array | None = None
    marks: Marks | None = None


def rate_1EN(inputs: Inputs) -> jax.Array:
    """The rate of decay against elapsed_BE1, for `recurrence.compose`."""
    return inputs.A_EN.astype(jnp.float32)[None]


def selective_scan(
    u_BSE: jax.Array,
    dt_BSE: jax.Array,
    A_EN: jax.Array,
    B_BSN: jax.Array,
    C_BSN: jax.Array,
    D_E: jax.Array,
    *,
    z_BSE: jax.Array | None = None,
    dt_bias_E: jax.Array | None = None,
    dt_softplus: bool = True,
    segments_BS: jax.Array | None = None,
    initial_state_BEN: jax.Array | None = None,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t u_t (x) B_t;  y_t = (h_t C_t + D u_t) * silu(z_t).  Gu and Dao 2023, algorithm 2.

    dt_t = softplus(dt_BSE + dt_bias). States and all arithmetic are fp32. Across documents the state starts again from zero: at
    a token t >= 1 whose segment is neither 0 nor that of token t - 1. Padding passes the state on unchanged; its y is 0 and
    it has no gradient; what stands there has to be finite. Token 0 never resets: whoever passes an initial state that does
    not belong to its document zeroes it.

    Args:
      u_BSE: inputs, floating.
      dt_BSE: step sizes before bias and softplus, floating.
      A_EN: negative real rates of decay, fp32.
      B_BSN, C_BSN: input and output maps of each token, floating.
      D_E: weight of the skip connection.
      z_BSE: gate, applied inside the operation; None for no gate.
      dt_bias_E: added to dt before the softplus; None is 0.
      dt_softplus: False takes dt as it is; it must then be >= 0.
      segments_BS: int document ids, 0 for padding; None for one document a row.
      initial_state_BEN: state before token 0; None is zero. Differentiable.
      implementation: a name from `pallas_kernels.KERNELS["selective_scan"]`, or "auto".

    Returns:
      y_BSE in u's dtype; final_state_BEN fp32, differentiable: the state after the last token.

    Raises:
      UserError: arguments that do not fit together, or an implementation that cannot run.
    """
    inputs = Inputs(u_BSE, dt_BSE, A_EN, B_BSN, C_BSN, D_E, z_BSE, dt_bias_E)
    check(inputs, segments_BS, initial_state_BEN)
    spec = ScanSpec(bool(dt_softplus))
    backend = recurrence_backend("selective_scan", implementation, spec, inputs, segments_BS)
    if initial_state_BEN is None:
        initial_state_BEN = jnp.zeros((u_BSE.shape[0], *A_EN.shape), jnp.float32)
    return scan(backend, spec, inputs._replace(marks=marks(segments_BS)), initial_state_BEN.astype(jnp.float32))


def check(inputs: Inputs, segments_BS: Any = None, initial_state_BEN: Any = None) -> None:
    """Raises a one-line UserError for arguments that do not fit together."""

    def require(holds, message):
        if not holds:
            raise UserError(f"selective_scan: {message}")

    u, A = inputs.u_BSE, inputs.A_EN
    require(u.ndim == 3, f"u_BSE has shape {u.shape}; it needs 3 dims, B, S, E")
    (B, S, E), N = u.shape, A.shape[-1] if A.ndim else 0
    require(S > 0, f"u_BSE has S={S} tokens; it needs at least 1")
    require(A.shape == (E, N) and N > 0, f"A_EN has shape {A.shape}; with u_BSE {u.shape} it needs E={E} and N of at least 1")
    needed = dict(dt_BSE=(B, S, E), B_BSN=(B, S, N), C_BSN=(B, S, N), D_E=(E,), z_BSE=(B, S, E), dt_bias_E=(E,))
    arrays = inputs._asdict() | dict(initial_state_BEN=initial_state_BEN)
    for name, x in arrays.items():
        if x is not None and name != "marks":
            shape = (needed | dict(u_BSE=u.shape, A_EN=A.shape, initial_state_BEN=(B, E, N)))[name]
            require(x.shape == shape, f"{name} has shape {x.shape}; with u_BSE {u.shape} and A_EN {A.shape} it needs {shape}")
            require(jnp.issubdtype(x.dtype, jnp.floating), f"{name} has dtype {x.dtype}; it needs a floating one")
    if segments_BS is not None:
        is_ids = segments_BS.shape == (B, S) and jnp.issubdtype(segments_BS.dtype, jnp.integer)
        require(is_ids, f"segments_BS is {segments_BS.dtype}{segments_BS.shape}; it needs int{(B, S)}")
