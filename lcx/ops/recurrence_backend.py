"""How an operation calls a backend of a recurrence: the choice of it, and the one custom VJP around every one.

What a backend is made of stands in `lcx.ops.selective_scan`, "Backends"; that of `lcx.ops.ssd` has the same functions.
"""

import functools
from types import ModuleType
from typing import Any

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from lcx.ops import dispatch


def recurrence_backend(op: str, implementation: str, spec: Any, inputs: Any, segments_BS: Any = None) -> ModuleType:
    """The backend module that carries out `op` on arrays like these.

    Raises:
      UserError: see `dispatch.choose`.
    """
    given = {name: x for name, x in (inputs._asdict() | dict(segments_BS=segments_BS, marks=None)).items() if x is not None}
    shapes, dtypes = ({name: getattr(x, what) for name, x in given.items()} for what in ("shape", "dtype"))
    return dispatch.choose(op, implementation, spec=spec, shapes=shapes, dtypes=dtypes)


def kept(y: jax.Array, residuals: Any) -> tuple[jax.Array, Any]:
    """Output and residuals under the names by which a remat policy saves them, so that the scan is not run again."""
    return checkpoint_name(y, "recurrence_out"), jax.tree.map(lambda x: checkpoint_name(x, "recurrence_states"), residuals)


def without_marks(gradients: Any, inputs: Any) -> Any:
    """Gradients of a backend as those of its inputs: marks are integers and have none."""
    return gradients._replace(marks=jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), inputs.marks))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def scan(backend: ModuleType, spec: Any, inputs: Any, initial_state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(y, final state) of tokens that are all here."""
    return backend.forward(inputs, initial_state, spec=spec)[:2]


def _forward(backend, spec, inputs, initial_state):
    y, final_state, residuals = backend.forward(inputs, initial_state, spec=spec)
    y, residuals = kept(y, residuals)
    return (y, final_state), (inputs, residuals)


def _backward(backend, spec, saved, cotangents):
    inputs, residuals = saved
    gradients, dinitial_state = backend.backward(inputs, residuals, *cotangents, spec=spec)
    return without_marks(gradients, inputs), dinitial_state


scan.defvjp(_forward, _backward)
