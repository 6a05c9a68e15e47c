"""LongNet (Ding et al. 2023, arXiv 2307.02486): dilated attention of linear cost, to a billion tokens and on."""

import dataclasses

import jax
import jax.numpy as jnp

from lcx.context import SequenceContext
from lcx.dims import Sizes
from lcx.mixers import Caps, implementation_problems
from lcx.mixers.multi_head import MultiHead, head_problems, softcap_problems
from lcx.parallel.dilated import dilated_attention, plan_branches
from lcx.registry import UserError


class LongNet(MultiHead):
    """Multi-head attention in branches, each over longer segments and fewer of their tokens; see `lcx.parallel.dilated`.

    The pattern is counted from the start of the row: documents of one row do not see each other, but which of its own tokens a
    document sees depends on where it stands.
    """

    caps = Caps(bidirectional=True, layouts=("contiguous",))

    @dataclasses.dataclass(frozen=True)
    class Config:
        """Dilated attention.

        Attributes:
          segments: w of each branch, tokens in a segment. Growing as fast as the dilations, the cost is linear in the length.
          dilations: r of each branch: key/value head g and its query heads keep tokens g mod r, g mod r + r, ...
          causal: no token sees a later one.
          softcap: None, or c for c * tanh(score / c).
          qk_norm: RMS norm on queries and keys before the position encoding.
          mixing_gradient: False takes the branches' mixing weights as constants in the backward pass, as the paper's code does.
          implementation: of the attention operation: auto, reference, chunked, ...
        """

        segments: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768)
        dilations: tuple[int, ...] = (1, 2, 4, 8, 16)
        causal: bool = True
        softcap: float | None = None
        qk_norm: bool = False
        mixing_gradient: bool = True
        implementation: str = "auto"

    @classmethod
    def tiny(cls):
        """Config differences for contract tests."""
        return dict(segments=(4, 16, 64), dilations=(1, 2, 4))

    @classmethod
    def check(cls, config: Config, sizes: Sizes, length: int, mesh: dict[str, int]) -> list[str]:
        """What stands against this mixer at this size, one line each."""
        problems = head_problems(sizes, mesh) + softcap_problems(config.softcap)
        problems += implementation_problems("attention", config.implementation)
        try:
            plan_branches(config.segments, config.dilations, length, mesh["seq"])
        except UserError as error:
            problems.append(str(error))
        return problems

    @classmethod
    def score_flops(cls, config: Config, sizes: Sizes, ctx: SequenceContext) -> jax.Array:
        """fp32 forward FLOPs of the scores of one layer on this batch: 4 K per head and (query, kept key) pair.

        In a branch one token in r is kept by a head, and sees one in r of those before it in its segment and document.
        """
        S = ctx.positions_BS.shape[1]
        order_S = jnp.arange(S, dtype=jnp.int32)
        weights_BS = 1.0 if ctx.segments_BS is None else (ctx.segments_BS > 0).astype(jnp.float32)
        total = jnp.float32(0)
        for w, r in zip(config.segments, config.dilations, strict=True):
            seen_BS = jnp.minimum((order_S % min(w, S))[None], ctx.positions_BS) // r + 1
            total = total + jnp.sum(weights_BS * seen_BS.astype(jnp.float32)) / r
        return 4.0 * sizes.H * sizes.K * total * (1 if config.causal else 2)

    def __init__(self, config, sizes, posenc, *, rngs):
        if posenc.slopes(sizes.H) is not None:
            raise UserError("mixer 'longnet' takes no position encoding that is a bias on scores; use 'rope' or 'none'")
        super().__init__(config, sizes, posenc, rngs=rngs)

    def _attention(self, q_BSHK, k_BTGK, v_BTGK, ctx):
        config = self.config
        return dilated_attention(
            q_BSHK,
            k_BTGK,
            v_BTGK,
            mesh=ctx.mesh,
            segments=config.segments,
            dilations=config.dilations,
            causal=config.causal,
            segments_BS=ctx.segments_BS,
            softcap=config.softcap,
            mixing_gradient=config.mixing_gradient,
            implementation=config.implementation,
        )
