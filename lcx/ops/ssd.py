"""State-space duality (the scan of Mamba-2) on one device: one meaning, one custom VJP, any backend.

Backends. A backend is a module (`pallas_kernels.KERNELS["ssd"]`) of the five functions of a selective scan's backend
(`lcx.ops.selective_scan`, "Backends"), with this module's `Inputs`, states BHKN, and `Affine(elapsed_BH11, state_BHKN)` from
`summary` and `reverse_summary`, whose rate is `rate_1H11(inputs)`. Over a cut sequence they are used in the same way.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lcx.ops.recurrence import Marks, marks, step_sizes
from lcx.ops.recurrence_backend import recurrence_backend, scan
from lcx.registry import UserError


@dataclasses.dataclass(frozen=True)
class SsdSpec:
    """What a backend needs to know statically. See `ssd` for the fields."""

    dt_softplus: bool = True
    dt_limit: tuple[float, float] = (0.0, math.inf)
    chunk: int | None = None


class Inputs(NamedTuple):
    """The arrays, as given by the user; or their gradients."""

    x_BSHK: jax.Array
    dt_BSH: jax.Array
    A_H: jax.Array
    B_BSGN: jax.Array
    C_BSGN: jax.Array
    D_H: jax.Array
    dt_bias_H: jax.Array | None = None
    marks: Marks | None = None


def rate_1H11(inputs: Inputs) -> jax.Array:
    """The rate of decay against elapsed_BH11, for `recurrence.compose`."""
    return inputs.A_H.astype(jnp.float32)[None, :, None, None]


def steps_BSH(inputs: Inputs, spec: SsdSpec) -> jax.Array:
    """fp32 step sizes within the limits, 0 at padding."""
    real_BS = None if inputs.marks is None else inputs.marks.real_BS
    return step_sizes(inputs.dt_BSH, inputs.dt_bias_H, spec.dt_softplus, real_BS, spec.dt_limit)


def ssd(
    x_BSHK: jax.Array,
    dt_BSH: jax.Array,
    A_H: jax.Array,
    B_BSGN: jax.Array,
    C_BSGN: jax.Array,
    D_H: jax.Array,
    *,
    dt_bias_H: jax.Array | None = None,
    dt_softplus: bool = True,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    segments_BS: jax.Array | None = None,
    initial_state_BHKN: jax.Array | None = None,
    chunk: int | None = None,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t (x) B_t;  y_t = h_t C_t + D x_t.  Dao and Gu, "Transformers are SSMs" (2024).

    One rate of decay per head; head h reads B and C of group h // (H // G). dt_t = clip(softplus(dt_BSH + dt_bias), dt_limit).
    States, decays and sums are fp32; products of fp32 arrays follow `jax_default_matmul_precision`. Documents, padding and
    token 0 as in `lcx.ops.selective_scan.selective_scan`.

    Args:
      x_BSHK: inputs, floating.
      dt_BSH: step sizes before bias, softplus and limits, floating.
      A_H: negative real rates of decay, fp32.
      B_BSGN, C_BSGN: input and output maps of each token, floating; G divides H.
      D_H: weight of the skip connection.
      dt_bias_H: added to dt before the softplus; None is 0.
      dt_softplus: False takes dt as it is.
      dt_limit: least and greatest step size; the least must not be negative.
      segments_BS: int document ids, 0 for padding; None for one document a row.
      initial_state_BHKN: state before token 0; None is zero. Differentiable.
      chunk: tokens in a chunk; None leaves it to the implementation. It never changes what is computed.
      implementation: a name from `pallas_kernels.KERNELS["ssd"]`, or "auto".

    Returns:
      y_BSHK in x's dtype; final_state_BHKN fp32, differentiable: the state after the last token.

    Raises:
      UserError: arguments that do not fit together, or an implementation that cannot run.
    """
    inputs = Inputs(x_BSHK, dt_BSH, A_H, B_BSGN, C_BSGN, D_H, dt_bias_H)
    spec = SsdSpec(bool(dt_softplus), tuple(dt_limit), chunk)
    check(inputs, spec, segments_BS, initial_state_BHKN)
    backend = recurrence_backend("ssd", implementation, spec, inputs, segments_BS)
    if initial_state_BHKN is None:
        B, _, H, K = x_BSHK.shape
        initial_state_BHKN = jnp.zeros((B, H, K, B_BSGN.shape[3]), jnp.float32)
    return scan(backend, spec, inputs._replace(marks=marks(segments_BS)), initial_state_BHKN.astype(jnp.float32))


def check(inputs: Inputs, spec: SsdSpec, segments_BS: Any = None, initial_state_BHKN: Any = None) -> None:
    """Raises a one-line UserError for arguments that do not fit together."""

    def require(holds, message):
        if not holds:
            raise UserError(f"ssd: {message}")

    x, maps = inputs.x_BSHK, inputs.B_BSGN
    for name, array in (("x_BSHK", x), ("B_BSGN", maps)):
        require(array.ndim == 4, f"{name} has shape {array.shape}; it needs 4 dims, {', '.join(name[2:])}")
    (B, S, H, K), (G, N) = x.shape, maps.shape[2:]
    require(S > 0, f"x_BSHK has S={S} tokens; it needs at least 1")
    require(G > 0 and H % G == 0, f"H={H} heads cannot be divided among G={G} groups of B and C")
    needed = dict(dt_BSH=(B, S, H), A_H=(H,), B_BSGN=(B, S, G, N), C_BSGN=(B, S, G, N), D_H=(H,), dt_bias_H=(H,))
    needed |= dict(x_BSHK=x.shape, initial_state_BHKN=(B, H, K, N))
    for name, array in (inputs._asdict() | dict(initial_state_BHKN=initial_state_BHKN)).items():
        if array is not None and name != "marks":
            require(array.shape == needed[name], f"{name} has shape {array.shape}; with x_BSHK {x.shape} it needs {needed[name]}")
            require(jnp.issubdtype(array.dtype, jnp.floating), f"{name} has dtype {array.dtype}; it needs a floating one")
    limit = spec.dt_limit
    require(len(limit) == 2 and 0 <= limit[0] <= limit[1], f"dt_limit={limit} needs to be two numbers, 0 <= least <= greatest")
    require(spec.chunk is None or spec.chunk >= 1, f"chunk={spec.chunk} needs to be at least 1, or None")
    if segments_BS is not None:
        is_ids = segments_BS.shape == (B, S) and jnp.issubdtype(segments_BS.dtype, jnp.integer)
        require(is_ids, f"segments_BS is {segments_BS.dtype}{segments_BS.shape}; it needs int{(B, S)}")
