"""Mamba (Gu and Dao 2023, arXiv 2312.00752): a selective state-space model, cost linear and state constant in the length."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lcx.context import SequenceContext
from lcx.dims import Sizes
from lcx.initializers import step_size_bias, undecayed, uniform
from lcx.mixers import require_layout
from lcx.mixers.recurrent import Recurrent, channel_problems, recurrence_problems, tokens_of
from lcx.parallel.recurrences import causal_conv, selective_scan
from lcx.sharding import tokenwise


class Mamba(Recurrent):
    """Projections to E channels and a gate, a short convolution, the selective scan, a projection back."""

    @dataclasses.dataclass(frozen=True)
    class Config:
        """Selective scan.

        Attributes:
          expand: E over the model width.
          state: state entries of each channel, N.
          conv: width of the convolution, W.
          dt_rank: rank of the map to the step sizes; None for a sixteenth of the model width.
          dt_min, dt_max: between which the step sizes start.
          implementation: of the scan: auto, reference, chunked, ...
          conv_implementation: of the convolution, likewise.
        """

        expand: int = 2
        state: int = 16
        conv: int = 4
        dt_rank: int | None = None
        dt_min: float = 1e-3
        dt_max: float = 0.1
        implementation: str = "auto"
        conv_implementation: str = "auto"

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Config differences for contract tests."""
        return dict(state=4)

    @classmethod
    def check(cls, config: Config, sizes: Sizes, length: int, mesh: dict[str, int]) -> list[str]:
        """What stands against this mixer at this size, one line each."""
        problems = recurrence_problems(config, "selective_scan", length, mesh)
        E = config.expand * sizes.D
        problems += channel_problems(E, mesh)
        if config.dt_rank is not None and config.dt_rank < 1:
            problems.append(f"dt_rank={config.dt_rank} must be at least 1, or None")
        return problems

    @classmethod
    def score_flops(cls, config: Config, sizes: Sizes, ctx: SequenceContext) -> jax.Array:
        """fp32 forward FLOPs of one layer's scan and convolution on this batch: decay, input and output of each state entry are
        a multiplication and an addition, and so is each weight of the convolution."""
        E = config.expand * sizes.D
        return tokens_of(ctx) * (6.0 * E * config.state + 2.0 * E * config.conv)

    def __init__(self, config: Config, sizes: Sizes, posenc: Any, *, rngs: nnx.Rngs):
        D, E, N, W = sizes.D, config.expand * sizes.D, config.state, config.conv
        R = config.dt_rank or math.ceil(D / 16)
        self.config = config
        self.x_DE = uniform(rngs, "DE", (D, E), D**-0.5)
        self.z_DE = uniform(rngs, "DE", (D, E), D**-0.5)
        self.conv_EW, self.conv_E = uniform(rngs, "EW", (E, W), W**-0.5), uniform(rngs, "E", (E,), W**-0.5)
        self.dt_ER = uniform(rngs, "ER", (E, R), E**-0.5)
        self.B_EN = uniform(rngs, "EN", (E, N), E**-0.5)
        self.C_EN = uniform(rngs, "EN", (E, N), E**-0.5)
        self.dt_RE = uniform(rngs, "RE", (R, E), R**-0.5)
        self.dt_bias_E = step_size_bias(rngs, "E", (E,), config.dt_min, config.dt_max)
        self.A_log_EN = undecayed(jnp.log(jnp.broadcast_to(jnp.arange(1.0, N + 1), (E, N))), "EN")
        self.D_E = undecayed(jnp.ones(E), "E")
        self.out_ED = uniform(rngs, "ED", (E, D), (E * sizes.L) ** -0.5)

    def __call__(self, x_BSD: jax.Array, ctx: SequenceContext) -> jax.Array:
        """y_BSD in x's dtype."""
        require_layout(self.caps, ctx.layout, ctx.mesh.shape["seq"])
        run = lambda fn, w, *tokens: tokenwise(fn, w, *tokens, mesh=ctx.mesh, dtype=x_BSD.dtype)
        u_BSE, z_BSE = run(self._inputs, {"x_DE": self.x_DE, "z_DE": self.z_DE}, x_BSD)
        u_BSE = causal_conv(
            u_BSE,
            self.conv_EW.get_value(),
            self.conv_E.get_value(),
            mesh=ctx.mesh,
            segments_BS=ctx.segments_BS,
            activation="silu",
            implementation=self.config.conv_implementation,
        )
        weights = {"dt_ER": self.dt_ER, "dt_RE": self.dt_RE, "B_EN": self.B_EN, "C_EN": self.C_EN}
        dt_BSE, B_BSN, C_BSN = run(self._maps, weights, u_BSE)
        y_BSE = selective_scan(
            u_BSE,
            dt_BSE,
            -jnp.exp(self.A_log_EN.get_value()),
            B_BSN,
            C_BSN,
            self.D_E.get_value(),
            mesh=ctx.mesh,
            z_BSE=z_BSE,
            dt_bias_E=self.dt_bias_E.get_value(),
            segments_BS=ctx.segments_BS,
            implementation=self.config.implementation,
        )
        return run(self._output, {"out_ED": self.out_ED}, y_BSE)

    @staticmethod
    def _inputs(w: dict[str, jax.Array], x_BSD: jax.Array) -> tuple[jax.Array, jax.Array]:
        return x_BSD @ w["x_DE"].astype(x_BSD.dtype), x_BSD @ w["z_DE"].astype(x_BSD.dtype)

    @staticmethod
    def _maps(w: dict[str, jax.Array], u_BSE: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        w = {name: x.astype(u_BSE.dtype) for name, x in w.items()}
        return u_BSE @ w["dt_ER"] @ w["dt_RE"], u_BSE @ w["B_EN"], u_BSE @ w["C_EN"]

    @staticmethod
    def _output(w: dict[str, jax.Array], y_BSE: jax.Array) -> jax.Array:
        return y_BSE @ w["out_ED"].astype(y_BSE.dtype)
