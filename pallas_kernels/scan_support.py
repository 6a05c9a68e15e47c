"""What kernels of the recurrences and of the convolution share on every device: dtypes that they take, gradients as wanted."""

from typing import Any

import jax.numpy as jnp

KINDS = (jnp.bfloat16, jnp.float32)


def wrong_kind(dtypes: dict[str, Any], names: tuple[str, ...]) -> str | None:
    """What is wrong with the dtypes of those of the arrays that are there; None for nothing."""
    for name in names:
        if name in dtypes and dtypes[name] not in KINDS:
            return f"{name} has dtype {jnp.dtype(dtypes[name])}; it takes {' and '.join(jnp.dtype(kind).name for kind in KINDS)}"
    return None


def as_given(gradients: Any, inputs: Any) -> Any:
    """Gradients in the dtypes of the inputs that they are of; None for what is not there."""
    found = (None if x is None else x.astype(given.dtype) for x, given in zip(gradients, inputs, strict=True))
    return type(inputs)(*found)
