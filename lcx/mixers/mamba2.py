"""Mamba-2 (Dao and Gu 2024, arXiv 2405.21060): one rate of decay per head, computed by matrix products."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lcx.context import SequenceContext
from lcx.dims import Sizes
from lcx.initializers import step_size_bias, undecayed, uniform, vector
from lcx.mixers import require_layout
from lcx.mixers.recurrent import Recurrent, channel_problems, recurrence_problems, tokens_of
from lcx.ops.norm import rms_norm
from lcx.parallel.recurrences import causal_conv, ssd
from lcx.sharding import tokenwise

INPUTS = ("z_DE", "x_DE", "B_DGN", "C_DGN", "dt_DH")


class Mamba2(Recurrent):
    """Projections to heads, maps, step sizes and a gate in one go, a short convolution, SSD, a gated norm, a projection back."""

    @dataclasses.dataclass(frozen=True)
    class Config:
        """State-space duality.

        Attributes:
          expand: E, the width of all heads, over the model width.
          head_dim: width of a head, K.
          state: state entries of each channel, N.
          groups: B and C are shared by the heads of a group, which the gated norm norms by itself; G.
          conv: width of the convolution, W.
          dt_min, dt_max: between which the step sizes start.
          dt_limit: between which they stay.
          norm_eps: of the gated norm.
          chunk: tokens in a chunk of the scan; None leaves it to the implementation.
          implementation: of the scan: auto, reference, chunked, ...
          conv_implementation: of the convolution, likewise.
        """

        expand: int = 2
        head_dim: int = 64
        state: int = 128
        groups: int = 1
        conv: int = 4
        dt_min: float = 1e-3
        dt_max: float = 0.1
        dt_limit: tuple[float, float] = (0.0, math.inf)
        norm_eps: float = 1e-5
        chunk: int | None = None
        implementation: str = "auto"
        conv_implementation: str = "auto"

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Config differences for contract tests."""
        return dict(state=8, head_dim=8, groups=2)

    @classmethod
    def check(cls, config: Config, sizes: Sizes, length: int, mesh: dict[str, int]) -> list[str]:
        """What stands against this mixer at this size, one line each."""
        problems = recurrence_problems(config, "ssd", length, mesh)
        E, tensor = config.expand * sizes.D, mesh["tensor"]
        problems += channel_problems(E, mesh)
        if config.head_dim < 1 or E % config.head_dim:
            return [*problems, f"head_dim={config.head_dim} must divide expand*model.dim={E}"]
        H = E // config.head_dim
        if config.groups < 1 or H % config.groups:
            problems.append(f"groups={config.groups} must divide the {H} heads")
        elif config.groups % tensor:
            problems.append(f"groups={config.groups} does not divide over mesh.tensor={tensor}")
        if config.norm_eps <= 0:
            problems.append(f"norm_eps={config.norm_eps} must be above 0")
        if config.chunk is not None and config.chunk < 1:
            problems.append(f"chunk={config.chunk} must be at least 1, or None")
        limit = config.dt_limit
        numbers = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in limit)
        if not numbers or len(limit) != 2 or not 0 <= limit[0] <= limit[1]:
            problems.append(f"dt_limit={limit} must be two numbers, 0 <= least <= greatest")
        return problems

    @classmethod
    def score_flops(cls, config: Config, sizes: Sizes, ctx: SequenceContext) -> jax.Array:
        """fp32 forward FLOPs of one layer's scan and convolution on this batch, as `Mamba.score_flops` counts them."""
        E, maps = config.expand * sizes.D, 2 * config.groups * config.state
        return tokens_of(ctx) * (6.0 * E * config.state + 2.0 * (E + maps) * config.conv)

    def __init__(self, config: Config, sizes: Sizes, posenc: Any, *, rngs: nnx.Rngs):
        D, E, G, N, W = sizes.D, config.expand * sizes.D, config.groups, config.state, config.conv
        H = E // config.head_dim
        self.config = config
        self.z_DE = uniform(rngs, "DE", (D, E), D**-0.5)
        self.x_DE = uniform(rngs, "DE", (D, E), D**-0.5)
        self.B_DGN = uniform(rngs, "DGN", (D, G, N), D**-0.5)
        self.C_DGN = uniform(rngs, "DGN", (D, G, N), D**-0.5)
        self.dt_DH = uniform(rngs, "DH", (D, H), D**-0.5)
        self.conv_x_EW, self.conv_x_E = uniform(rngs, "EW", (E, W), W**-0.5), uniform(rngs, "E", (E,), W**-0.5)
        self.conv_B_GNW, self.conv_B_GN = (
            uniform(rngs, "GNW", (G, N, W), W**-0.5),
            uniform(rngs, "GN", (G, N), W**-0.5, decay=False),
        )
        self.conv_C_GNW, self.conv_C_GN = (
            uniform(rngs, "GNW", (G, N, W), W**-0.5),
            uniform(rngs, "GN", (G, N), W**-0.5, decay=False),
        )
        self.dt_bias_H = step_size_bias(rngs, "H", (H,), config.dt_min, config.dt_max)
        self.A_log_H = undecayed(jnp.log(jax.random.uniform(rngs.params(), (H,), jnp.float32, 1.0, 16.0)), "H")
        self.D_H = undecayed(jnp.ones(H), "H")
        self.norm_E = vector("E", (E,), 1.0)
        self.out_ED = uniform(rngs, "ED", (E, D), (E * sizes.L) ** -0.5)

    def __call__(self, x_BSD: jax.Array, ctx: SequenceContext) -> jax.Array:
        """y_BSD in x's dtype."""
        require_layout(self.caps, ctx.layout, ctx.mesh.shape["seq"])
        config, (B, S, _) = self.config, x_BSD.shape
        run = lambda fn, w, *tokens: tokenwise(fn, w, *tokens, mesh=ctx.mesh, dtype=x_BSD.dtype)
        z_BSE, u_BSE, B_BSGN, C_BSGN, dt_BSH = run(self._inputs, {name: getattr(self, name) for name in INPUTS}, x_BSD)
        u_BSE = self._convolve(u_BSE, self.conv_x_EW, self.conv_x_E, ctx)
        B_BSGN = self._convolve(B_BSGN, self.conv_B_GNW, self.conv_B_GN, ctx)
        C_BSGN = self._convolve(C_BSGN, self.conv_C_GNW, self.conv_C_GN, ctx)
        y_BSHK = ssd(
            u_BSE.reshape(B, S, -1, config.head_dim),
            dt_BSH,
            -jnp.exp(self.A_log_H.get_value()),
            B_BSGN,
            C_BSGN,
            self.D_H.get_value(),
            mesh=ctx.mesh,
            dt_bias_H=self.dt_bias_H.get_value(),
            dt_limit=config.dt_limit,
            segments_BS=ctx.segments_BS,
            chunk=config.chunk,
            implementation=config.implementation,
        )
        return run(self._output, {"norm_E": self.norm_E, "out_ED": self.out_ED}, y_BSHK.reshape(B, S, -1), z_BSE)

    @staticmethod
    def _inputs(w: dict[str, jax.Array], x_BSD: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(jnp.tensordot(x_BSD, w[name].astype(x_BSD.dtype), 1) for name in INPUTS)

    def _convolve(self, x: jax.Array, w: nnx.Param, bias: nnx.Param, ctx: SequenceContext) -> jax.Array:
        """Over B S and any channels."""
        B, S, *channels = x.shape
        E = math.prod(channels)
        y_BSE = causal_conv(
            x.reshape(B, S, E),
            w.get_value().reshape(E, -1),
            bias.get_value().reshape(E),
            mesh=ctx.mesh,
            segments_BS=ctx.segments_BS,
            activation="silu",
            implementation=self.config.conv_implementation,
        )
        return y_BSE.reshape(x.shape)

    def _output(self, w: dict[str, jax.Array], y_BSE: jax.Array, z_BSE: jax.Array) -> jax.Array:
        gated_BSE = y_BSE.astype(jnp.float32) * jax.nn.silu(z_BSE.astype(jnp.float32))
        # Each group by itself, so that a tensor shard of whole groups needs nothing of the others.
        grouped = gated_BSE.reshape(*gated_BSE.shape[:2], self.config.groups, -1)
        ones = jnp.ones(grouped.shape[-1], jnp.float32)
        normed_BSE = rms_norm(grouped, ones, self.config.norm_eps).reshape(gated_BSE.shape) * w["norm_E"][None, None]
        return normed_BSE.astype(y_BSE.dtype) @ w["out_ED"].astype(y_BSE.dtype)
