"""Gated feed-forward: down(activation(gate(x)) * up(x)); SwiGLU with silu (arXiv 2002.05202)."""

import dataclasses

import jax
from flax import nnx

from lcx.dims import Sizes
from lcx.ffn.activations import activation
from lcx.initializers import matrix


class Gated(nnx.Module):
    """The feed-forward of the Llama family."""

    @dataclasses.dataclass(frozen=True)
    class Config:
        """Gated feed-forward.

        Attributes:
          width: F; None takes 8/3 of the model width, rounded up to a multiple of 128.
          activation: silu, gelu, gelu_tanh, relu or relu_squared.
        """

        width: int | None = None
        activation: str = "silu"

    def __init__(self, config: Config, sizes: Sizes, *, rngs: nnx.Rngs):
        D, F = sizes.D, self.inner_width(config, sizes.D)
        self.activation = config.activation
        activation(config.activation, "ffns.gated.activation")
        self.gate_DF = matrix(rngs, "DF", (D, F), fan_in=D)
        self.up_DF = matrix(rngs, "DF", (D, F), fan_in=D)
        self.down_FD = matrix(rngs, "FD", (F, D), fan_in=F, gain=(2 * sizes.L) ** -0.5)

    @staticmethod
    def inner_width(config: Config, D: int) -> int:
        """F."""
        return config.width if config.width is not None else -(-8 * D // (3 * 128)) * 128

    def weights(self) -> dict[str, nnx.Param]:
        """Name -> parameter."""
        return {"gate_DF": self.gate_DF, "up_DF": self.up_DF, "down_FD": self.down_FD}

    def apply(self, w: dict[str, jax.Array], x_BCD: jax.Array) -> jax.Array:
        """y_BCD in x's dtype."""
        dtype = x_BCD.dtype
        act = activation(self.activation, "ffns.gated.activation")
        hidden_BCF = act(x_BCD @ w["gate_DF"].astype(dtype)) * (x_BCD @ w["up_DF"].astype(dtype))
        return hidden_BCF @ w["down_FD"].astype(dtype)
