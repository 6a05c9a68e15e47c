"""The short depthwise causal convolution in front of a recurrence, on one device: one meaning, one custom VJP, any backend.

Backends. A backend is a module (`pallas_kernels.KERNELS["causal_conv"]`) of

    refuse(spec, shapes, dtypes, device_kind) -> why it cannot run, or None.
    forward(inputs, *, spec) -> y_BSE in x's dtype. Besides the inputs nothing is kept for the backward pass.
    backward(inputs, dy_BSE, *, spec) -> gradients (`Inputs`, in the dtypes of the inputs, segments None; initial_BWE or None).

What concerns only the ends of a row is here, for every backend: the rows that are handed on, and the gradient of those in front.
"""

import dataclasses
import functools
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lcx.ops import causal_conv_chunked, dispatch
from lcx.registry import UserError, unknown

ACTIVATIONS = ("silu",)


@dataclasses.dataclass(frozen=True)
class ConvSpec:
    """What a backend needs to know statically. See `causal_conv` for the fields."""

    activation: str | None = None


class Inputs(NamedTuple):
    """The arrays of a convolution, zeros where the user gives none; or their gradients. initial_BWE is in x's dtype."""

    x_BSE: jax.Array
    w_EW: jax.Array
    bias_E: jax.Array
    initial_BWE: jax.Array
    segments_BS: jax.Array | None = None


def causal_conv(
    x_BSE: jax.Array,
    w_EW: jax.Array,
    bias_E: jax.Array | None = None,
    *,
    segments_BS: jax.Array | None = None,
    initial_BWE: jax.Array | None = None,
    activation: str | None = None,
    implementation: str = "auto",
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
      implementation: a name from `pallas_kernels.KERNELS["causal_conv"]`, or "auto".

    Returns:
      y_BSE in x's dtype; final_BWE in x's dtype, differentiable: the `initial_BWE` of what comes next. Rows that are not of the
      last token's document are 0, so that a continuation need only compare that document with its own.

    Raises:
      UserError: arguments that do not fit together, or an implementation that cannot run.
    """
    check(x_BSE, w_EW, bias_E, segments_BS, initial_BWE, activation)
    (B, _, E), W = x_BSE.shape, w_EW.shape[1]
    initial_BWE = jnp.zeros((B, W - 1, E), x_BSE.dtype) if initial_BWE is None else initial_BWE.astype(x_BSE.dtype)
    bias_E = jnp.zeros(E, jnp.float32) if bias_E is None else bias_E
    inputs, spec = Inputs(x_BSE, w_EW, bias_E, initial_BWE, segments_BS), ConvSpec(activation)
    given = {name: x for name, x in inputs._asdict().items() if x is not None}
    shapes, dtypes = ({name: getattr(x, what) for name, x in given.items()} for what in ("shape", "dtype"))
    backend = dispatch.choose("causal_conv", implementation, spec=spec, shapes=shapes, dtypes=dtypes)
    return _convolve(backend, spec, inputs), _last_rows(inputs)


def _last_rows(inputs: Inputs) -> jax.Array:
    """The last W - 1 inputs, 0 where they are not of the last token's document."""
    rows, S = inputs.initial_BWE.shape[1], inputs.x_BSE.shape[1]
    last = lambda initial, x: jnp.concatenate([initial, x[:, max(0, S - rows) :]], axis=1)[:, min(rows, S) :]
    final_BWE, segments_BS = last(inputs.initial_BWE, inputs.x_BSE), inputs.segments_BS
    if segments_BS is None:
        return final_BWE
    owner_BW = last(jnp.broadcast_to(segments_BS[:, :1], final_BWE.shape[:2]), segments_BS)
    same_BW = (owner_BW == segments_BS[:, -1:]) & (owner_BW != 0)
    return jnp.where(same_BW[..., None], final_BWE, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _convolve(backend: ModuleType, spec: ConvSpec, inputs: Inputs) -> jax.Array:
    return backend.forward(inputs, spec=spec)


def _forward(backend, spec, inputs):
    return _convolve(backend, spec, inputs), inputs


def _backward(backend, spec, inputs, dy_BSE):
    gradients, segments_BS = backend.backward(inputs, dy_BSE, spec=spec), inputs.segments_BS
    if gradients.initial_BWE is None:
        gradients = gradients._replace(initial_BWE=_of_initial(spec, inputs, dy_BSE))
    no_gradient = None if segments_BS is None else np.zeros(segments_BS.shape, jax.dtypes.float0)
    return (gradients._replace(segments_BS=no_gradient),)


def _of_initial(spec: ConvSpec, inputs: Inputs, dy_BSE: jax.Array) -> jax.Array:
    """The gradient of the rows in front of token 0: they are taps of the first W - 1 tokens alone. Summed in fp32."""
    few = lambda x: None if x is None else x[:, : inputs.initial_BWE.shape[1]]
    exact = lambda x: x.astype(jnp.float32)
    first = inputs._replace(x_BSE=exact(few(inputs.x_BSE)), segments_BS=few(inputs.segments_BS))
    run = lambda initial_BWE: causal_conv_chunked.forward(first._replace(initial_BWE=initial_BWE), spec=spec)
    (dinitial_BWE,) = jax.vjp(run, exact(inputs.initial_BWE))[1](exact(few(dy_BSE)))
    return dinitial_BWE.astype(inputs.initial_BWE.dtype)


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
