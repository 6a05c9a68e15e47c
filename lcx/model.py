"""The language model: embedding, layers by pattern (a scan over groups of layers), norm, head."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from lcx import block, embedding, remat
from lcx.context import SequenceContext
from lcx.dims import Sizes
from lcx.initializers import matrix, vector
from lcx.ops.norm import rms_norm
from lcx.parallel.linear_cross_entropy import linear_cross_entropy
from lcx.sharding import constrain


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes and the ends of the model.

    Attributes:
      layers: number of layers.
      dim: model width.
      heads: query heads.
      kv_heads: key/value heads; None for as many as `heads`.
      head_dim: width of one head; None for dim / heads.
      vocab: size of the vocabulary; None for the tokenizer's.
      tied: the head is the transposed embedding table.
      logit_softcap: None, or c for c * tanh(logit / c).
      norm_eps: epsilon of the RMS norms.
      dtype: of activations; parameters are fp32.
    """

    layers: int = 2
    dim: int = 64
    heads: int = 4
    kv_heads: int | None = None
    head_dim: int | None = None
    vocab: int | None = None
    tied: bool = False
    logit_softcap: float | None = None
    norm_eps: float = 1e-5
    dtype: str = "bfloat16"

    def sizes(self, vocab: int) -> Sizes:
        """The sizes with every blank filled in."""
        return Sizes(
            D=self.dim,
            H=self.heads,
            G=self.kv_heads or self.heads,
            K=self.head_dim or self.dim // self.heads,
            V=self.vocab or vocab,
            L=self.layers,
            dtype=self.dtype,
            norm_eps=self.norm_eps,
        )


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """One entry of the pattern: which parts, with which configs.

    Attributes:
      name: as the pattern calls it.
      mixer, posenc, ffn: classes of the parts.
      mixer_config, posenc_config, ffn_config: their typed configs.
      layout: in which the mixer runs; None for the stream's where it accepts that, else the one it likes best.
    """

    name: str
    mixer: type
    mixer_config: Any
    posenc: type
    posenc_config: Any
    ffn: type
    ffn_config: Any
    layout: str | None = None

    def layout_in(self, stream: str) -> str:
        """In which layout the mixer runs; the block converts where it is not the stream's."""
        accepted = self.mixer.caps.layouts
        return self.layout or (stream if stream in accepted else accepted[0])


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The training objective.

    Attributes:
      chunk: tokens of one device whose logits exist at a time; None for 8192, or fewer with a large vocabulary.
      z_loss: weight of logsumexp^2.
      label_smoothing: share of the label spread evenly over the vocabulary.
    """

    chunk: int | None = None
    z_loss: float = 0.0
    label_smoothing: float = 0.0


class Model(nnx.Module):
    """A decoder (or, with mixers that are not causal, an encoder) over a stream of tokens."""

    def __init__(
        self, config: Config, sizes: Sizes, pattern: tuple[LayerKind, ...], block_config: block.Config, *, rngs: nnx.Rngs
    ):
        self.config, self.sizes, self.pattern, self.block_config = config, sizes, pattern, block_config
        self.embedding_VD = matrix(rngs, "VD", (sizes.V, sizes.D), fan_in=1, gain=0.02)
        # Entry i stacks the layers i, i + len(pattern), i + 2 len(pattern), ...
        self.stacks = nnx.List([self._stack(kind, len(range(i, sizes.L, len(pattern))), rngs) for i, kind in enumerate(pattern)])
        self.norm_D = vector("D", (sizes.D,), 1.0)
        if not config.tied:
            self.head_DV = matrix(rngs, "DV", (sizes.D, sizes.V), fan_in=sizes.D)

    def _stack(self, kind: LayerKind, count: int, rngs: nnx.Rngs) -> block.Block:
        posenc = kind.posenc(kind.posenc_config, self.sizes.K)

        @nnx.split_rngs(splits=count)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            mixer = kind.mixer(kind.mixer_config, self.sizes, posenc, rngs=rngs)
            return block.Block(self.block_config, self.sizes, mixer, kind.ffn(kind.ffn_config, self.sizes, rngs=rngs))

        return make(rngs)

    def hidden(self, tokens_BS: jax.Array, ctx: SequenceContext) -> jax.Array:
        """Normed hidden states x_BSD; tokens stand in the context's layout."""
        x_BSD = embedding.embed(self.embedding_VD.get_value(), tokens_BS, mesh=ctx.mesh, dtype=self.sizes.dtype)
        wanted = {kind.layout_in(ctx.layout) for kind in self.pattern}
        contexts = {layout: ctx.in_layout(layout) for layout in wanted | {ctx.layout}}
        graphs, states = zip(*(nnx.split(stack) for stack in self.stacks), strict=True)
        groups, rest = divmod(self.sizes.L, len(self.pattern))
        keep = remat.policy(self.block_config.remat)

        def layer(graph, kind, state, x_BSD):
            y_BSD = nnx.merge(graph, state)(x_BSD, contexts, ctx.layout, kind.layout_in(ctx.layout))
            return constrain(y_BSD, "BSD", ctx.mesh)

        def group(x_BSD, states, in_scan=True):
            for graph, kind, state in zip(graphs, self.pattern, states, strict=False):
                run = jax.checkpoint(functools.partial(layer, graph, kind), policy=keep, prevent_cse=not in_scan)
                x_BSD = run(state, x_BSD)
            return x_BSD, None

        whole = jax.tree.map(lambda w: w[:groups], states) if rest else states
        x_BSD, _ = lax.scan(group, x_BSD, whole, length=groups)
        if rest:
            x_BSD, _ = group(x_BSD, [jax.tree.map(lambda w: w[groups], state) for state in states[:rest]], in_scan=False)
        return rms_norm(x_BSD, self.norm_D.get_value(), self.sizes.norm_eps)

    @property
    def head_weight_DV(self) -> jax.Array:
        """The projection to the vocabulary."""
        return self.embedding_VD.get_value().T if self.config.tied else self.head_DV.get_value()

    def logits(self, tokens_BS: jax.Array, ctx: SequenceContext) -> jax.Array:
        """fp32 logits_BSV, whole: for parity tests and generation, never in the training step."""
        x_BSD = self.hidden(tokens_BS, ctx)
        logits_BSV = jnp.einsum("BSD,DV->BSV", x_BSD.astype(jnp.float32), self.head_weight_DV)
        cap = self.config.logit_softcap
        return cap * jnp.tanh(logits_BSV / cap) if cap else logits_BSV

    def loss(
        self, tokens_BS, labels_BS, weights_BS, ctx: SequenceContext, *, objective: LossConfig, per_token: bool = False
    ) -> tuple[jax.Array, ...]:
        """(sum of weighted losses, sum of weights[, nll_BS, correct_BS]), fp32, over every device."""
        return linear_cross_entropy(
            self.hidden(tokens_BS, ctx),
            self.head_weight_DV,
            labels_BS,
            weights_BS,
            mesh=ctx.mesh,
            chunk=objective.chunk,
            z_loss=objective.z_loss,
            label_smoothing=objective.label_smoothing,
            softcap=self.config.logit_softcap,
            per_token=per_token,
        )
