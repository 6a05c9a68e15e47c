"""Activation functions by name, shared by the feed-forwards."""

from collections.abc import Callable

import jax

from lcx.registry import unknown

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "relu_squared": lambda x: jax.nn.relu(x) ** 2,
}


def activation(name: str, field: str) -> Callable[[jax.Array], jax.Array]:
    """The function called `name`; `field` is the config field for the error."""
    if name not in ACTIVATIONS:
        raise unknown(field, name, ACTIVATIONS)
    return ACTIVATIONS[name]
