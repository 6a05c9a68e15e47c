"""Two-matrix feed-forward: down(activation(up(x))) (arXiv 1706.03762)."""

import dataclasses

import jax
from flax import nnx

from lcx.dims import Sizes
from lcx.ffn.activations import activation
from lcx.initializers import matrix


class Dense(nnx.Module):
    """The feed-forward of the original Transformer, without biases."""

    @dataclasses.dataclass(frozen=True)
    class Config:
        """Dense feed-forward.

        Attributes:
          width: F; None takes four times the model width.
          activation: silu, gelu, gelu_tanh, relu or relu_squared.
        """

        width: int | None = None
        activation: str = "gelu"

    def __init__(self, config: Config, sizes: Sizes, *, rngs: nnx.Rngs):
        D, F = sizes.D, self.inner_width(config, sizes.D)
        self.activation = config.activation
        activation(config.activation, "ffns.dense.activation")
        self.up_DF = matrix(rngs, "DF", (D, F), fan_in=D)
        self.down_FD = matrix(rngs, "FD", (F, D), fan_in=F, gain=(2 * sizes.L) ** -0.5)

    @staticmethod
    def inner_width(config: Config, D: int) -> int:
        """F."""
        return config.width if config.width is not None else 4 * D

    def weights(self) -> dict[str, nnx.Param]:
        """Name -> parameter."""
        return {"up_DF": self.up_DF, "down_FD": self.down_FD}

    def apply(self, w: dict[str, jax.Array], x_BCD: jax.Array) -> jax.Array:
        """y_BCD in x's dtype."""
        dtype = x_BCD.dtype
        act = activation(self.activation, "ffns.dense.activation")
        return act(x_BCD @ w["up_DF"].astype(dtype)) @ w["down_FD"].astype(dtype)
