"""Softmax attention as a mixer. One file: `full`, `blockwise`, `ring`, `ulysses`, ... differ in how it is spread over devices."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lcx import registry
from lcx.context import SequenceContext, TokenChunk
from lcx.dims import Sizes
from lcx.initializers import vector
from lcx.mixers import Caps, implementation_problems
from lcx.mixers.multi_head import MultiHead, head_problems, softcap_problems
from lcx.ops.attention import attention
from lcx.ops.types import AttentionSpec, Mask
from lcx.parallel import STRATEGIES, cyclic
from lcx.parallel.attention import context_attention
from lcx.parallel.plan import Plan
from lcx.sharding import tokenwise

FULL_LIMIT = 16_384


class Attention(MultiHead):
    """Softmax attention over the mesh."""

    strategy = "ring"
    automatic = "auto"  # what implementation="auto" stands for
    caps = Caps(bidirectional=True, layouts=("zigzag", "striped", "cyclic", "contiguous"))

    @dataclasses.dataclass(frozen=True)
    class Config:
        """Softmax attention.

        Attributes:
          causal: no token sees a later one.
          window: None, or (left, right) in tokens; sliding window W of other frameworks is (W - 1, 0).
          sink_tokens: leading tokens of a document that stay visible outside the window.
          sink_logits: a learned logit per head in the softmax denominator.
          softcap: None, or c for c * tanh(score / c).
          qk_norm: RMS norm on queries and keys before the position encoding.
          implementation: of the attention operation: auto, reference, chunked, ...
        """

        causal: bool = True
        window: tuple[int, int] | None = None
        sink_tokens: int = 0
        sink_logits: bool = False
        softcap: float | None = None
        qk_norm: bool = False
        implementation: str = "auto"

    @classmethod
    def check(cls, config: Config, sizes: Sizes, length: int, mesh: dict[str, int]) -> list[str]:
        """What stands against this mixer at this size, one line each."""
        problems = head_problems(sizes, mesh) + softcap_problems(config.softcap)
        problems += implementation_problems("attention", config.implementation)
        sides = config.window or (None, None)
        if len(sides) != 2 or any(side is not None and (not isinstance(side, int) or side < 0) for side in sides):
            problems.append(f"window={config.window} must be (left, right) in tokens, each >= 0 or None")
        elif any(side is not None and side >= 2**30 for side in sides):
            problems.append(f"window={config.window} must be below 2^30 tokens on each side; None sees all of them")
        if not 0 <= config.sink_tokens < 2**30:
            problems.append(f"sink_tokens={config.sink_tokens} must be from 0 to 2^30")
        elif config.sink_tokens and config.window is None:
            problems.append(f"sink_tokens={config.sink_tokens} without a window changes nothing: every token is seen anyway")
        if not problems and (reason := cls._strategy_refuses(config, sizes, length, mesh)):
            degree = f"ulysses_degree={config.ulysses_degree}, " if hasattr(config, "ulysses_degree") else ""
            given = (
                f"{degree}model.heads={sizes.H}, model.kv_heads={sizes.G} on mesh.seq={mesh['seq']}, mesh.tensor={mesh['tensor']}"
            )
            problems.append(f"{given}: {reason}; mixer 'ring' takes any heads")
        return problems

    @classmethod
    def _strategy_refuses(cls, config: Config, sizes: Sizes, length: int, mesh: dict[str, int]) -> str | None:
        """Why the strategy cannot serve these heads on this mesh, in the layout that the mixer likes best; None if it can."""
        mask = Mask(causal=config.causal, window=config.window, sink_tokens=config.sink_tokens)
        plan = Plan(
            spec=AttentionSpec(mask, scale=1.0, softcap=config.softcap),
            layout=cls.caps.layouts[0],
            shards=mesh["seq"],
            length=length,
            q_heads=sizes.H // mesh["tensor"],
            kv_heads=sizes.G // mesh["tensor"],
            packed=True,
            dtype=jnp.dtype(sizes.dtype),
            implementation=config.implementation,
            ulysses_degree=getattr(config, "ulysses_degree", None),
        )
        return registry.load(STRATEGIES, cls.strategy, field="strategy").refuse(plan)

    @classmethod
    def balanced_layout(cls, config: Config, *, packed: bool, tokens: int, shards: int) -> str | None:
        """zigzag where keys stay with their devices and a causal mask gives the later ones more of them; cyclic where documents
        decide who has more, and a device has blocks enough to balance long ones too. A window does not unbalance, and in
        contiguous order it needs the fewest hops."""
        if not config.causal or config.window is not None or cls.strategy == "ulysses" or not cls.caps.sharded:
            return None
        enough = packed and cyclic.blocks_of(tokens, shards) >= cyclic.ENOUGH
        return "cyclic" if enough and "cyclic" in cls.caps.layouts else "zigzag"

    @classmethod
    def score_flops(cls, config: Config, sizes: Sizes, ctx: SequenceContext) -> jax.Array:
        """fp32 forward FLOPs of the scores of one layer on this batch: 4 K per head and visible (query, key) pair.

        Pairs to the right are counted from the other end of the document, where they are as many.
        """
        before_BS = ctx.positions_BS.astype(jnp.float32)
        mask = Mask(causal=config.causal, window=config.window)
        seen_BS = 1.0 + (before_BS if mask.left is None else jnp.minimum(before_BS, mask.left))
        seen_BS = seen_BS + (before_BS if mask.right is None else jnp.minimum(before_BS, mask.right))
        if ctx.segments_BS is not None:
            seen_BS = jnp.where(ctx.segments_BS > 0, seen_BS, 0.0)
        return 4.0 * sizes.H * sizes.K * jnp.sum(seen_BS)

    def __init__(self, config: Config, sizes: Sizes, posenc: Any, *, rngs: nnx.Rngs):
        super().__init__(config, sizes, posenc, rngs=rngs)
        if config.sink_logits:
            self.sink_H = vector("H", (sizes.H,), 0.0)

    @property
    def mask(self) -> Mask:
        """Who sees whom."""
        return Mask(causal=self.config.causal, window=self.config.window, sink_tokens=self.config.sink_tokens)

    def _attention(self, q_BSHK, k_BTGK, v_BTGK, ctx):
        return context_attention(
            q_BSHK,
            k_BTGK,
            v_BTGK,
            mesh=ctx.mesh,
            strategy=self.strategy,
            layout=ctx.layout,
            mask=self.mask,
            segments_BS=ctx.segments_BS,
            softcap=self.config.softcap,
            alibi_slopes_H=self.posenc.slopes(self.sizes.H),
            sink_logits_H=self.sink_H.get_value() if self.config.sink_logits else None,
            implementation=self.automatic if self.config.implementation == "auto" else self.config.implementation,
            **self._strategy_options(),
        )

    def _strategy_options(self) -> dict[str, Any]:
        return {}


class OneShard(Attention):
    """Attention whose sequence lives on one device (batch and heads may still be spread)."""

    @classmethod
    def check(cls, config, sizes, length, mesh):
        """As `Attention.check`, and that `seq` is 1."""
        problems = super().check(config, sizes, length, mesh)
        if mesh["seq"] > 1:
            problems.append(
                f"mixer {cls.__name__.lower()!r} needs mesh.seq=1 and it is {mesh['seq']}; with a sharded sequence use 'ring'"
            )
        return problems


class Full(OneShard):
    """The oracle: the naive reference implementation, for tests and short sequences."""

    automatic = "reference"
    caps = Caps(bidirectional=True, sharded=False)

    @classmethod
    def check(cls, config, sizes, length, mesh):
        """As above, and that the scores fit."""
        problems = super().check(config, sizes, length, mesh)
        if length > FULL_LIMIT:
            problems.append(
                f"mixer 'full' holds all scores and stops at {FULL_LIMIT} tokens; sequence.length={length} needs "
                "'blockwise' or 'ring'"
            )
        return problems


class Blockwise(OneShard):
    """Memory-linear attention on one shard; with `block.fuse_attention` the Blockwise Parallel Transformer (arXiv 2305.19370)."""

    caps = Caps(bidirectional=True, sharded=False, fused=True)

    def prepare(self, x_BSD: jax.Array, ctx: SequenceContext) -> dict[str, jax.Array]:
        """Keys and values of all tokens, and their documents."""
        k_BTGK, v_BTGK = tokenwise(
            self._key_value, self._key_value_weights(), x_BSD, ctx.positions_BS, mesh=ctx.mesh, dtype=x_BSD.dtype
        )
        memory = {"k_BTGK": k_BTGK, "v_BTGK": v_BTGK}
        return memory if ctx.segments_BS is None else memory | {"segments_BT": ctx.segments_BS}

    def attend_weights(self) -> dict[str, nnx.Param]:
        """Parameters of `attend`."""
        sink = {"sink_H": self.sink_H} if self.config.sink_logits else {}
        return self._query_weights() | {"out_HKD": self.out_HKD} | sink

    def attend(self, w: dict[str, jax.Array], x_BCD: jax.Array, memory: dict[str, jax.Array], chunk: TokenChunk) -> jax.Array:
        """y_BCD of one chunk of queries against every key."""
        o_BCHK = attention(
            self._query(w, x_BCD, chunk.positions_BC),
            memory["k_BTGK"],
            memory["v_BTGK"],
            mask=self.mask,
            order_q=chunk.order,
            segments_q_BS=chunk.segments_BC,
            segments_k_BT=memory["segments_BT"] if "segments_BT" in memory else None,
            softcap=self.config.softcap,
            alibi_slopes_H=self.posenc.slopes(self.sizes.H),
            sink_logits_H=w["sink_H"] if self.config.sink_logits else None,
            implementation=self.config.implementation,
        )
        return self._output(w, o_BCHK)


class Ring(Attention):
    """Ring Attention (arXiv 2310.01889): keys and values travel, queries stay."""


class Ulysses(Attention):
    """DeepSpeed-Ulysses (arXiv 2309.14509): an all-to-all gives each device all tokens of some heads."""

    strategy = "ulysses"


class UlyssesRing(Attention):
    """Ulysses inside groups of devices, a ring between them (arXiv 2405.07719)."""

    strategy = "ulysses_ring"
    # Groups between one device and all of them have no evenly spaced tokens in striped and cyclic order.
    caps = Caps(bidirectional=True, layouts=("zigzag", "contiguous"))

    @dataclasses.dataclass(frozen=True)
    class Config(Attention.Config):
        """Softmax attention, and

        Attributes:
          ulysses_degree: devices in one Ulysses group; None takes the largest that the heads allow.
        """

        ulysses_degree: int | None = None

    def _strategy_options(self):
        return {"ulysses_degree": self.config.ulysses_degree}


class AllGather(Attention):
    """Keys and values of the whole sequence on every device: fewest, largest messages, memory linear in the full length."""

    strategy = "allgather"
