"""The residual block: norm, mixer, norm, feed-forward, and the one loop over tokens.

The feed-forward works position by position, so it runs chunk by chunk (Mini-Sequence Transformer, arXiv 2407.15892) and its
S x F hidden array never exists. With `fuse_attention` the attention of a chunk of queries joins the same loop (Blockwise
Parallel Transformer, arXiv 2305.19370). Each device loops over its own tokens.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from lcx import remat
from lcx.context import SequenceContext, TokenChunk
from lcx.dims import Sizes
from lcx.initializers import vector
from lcx.ops.norm import rms_norm
from lcx.ops.types import contiguous
from lcx.parallel import layouts
from lcx.sharding import tokenwise
from lcx.wide_gradient import joined, widen


@dataclasses.dataclass(frozen=True)
class Config:
    """The residual block.

    Attributes:
      token_chunk: tokens of one device that go through the feed-forward at a time; 0 takes all at once. Matrix units
        saturate at 8K tokens; more only costs memory.
      fuse_attention: the attention of a chunk runs in the same loop as its feed-forward.
      remat: what a layer keeps for the backward pass: attention, minimal, none, or auto for attention where the step fits and
        minimal where it does not.
    """

    token_chunk: int = 8192
    fuse_attention: bool = False
    remat: str = "auto"


def token_loop(body: Callable, tokens: Any, *, chunk: int, policy: Callable) -> jax.Array:
    """body(tokens of a chunk, index of its first token) over chunks of dimension 1, each rematerialised.

    A length that does not divide is cut into equal chunks and padded with zeros; the padding is cut off again.

    Args:
      body: maps a pytree of B C ... arrays and an int32 scalar to an array B C ....
      tokens: pytree of arrays b s ....
      chunk: most tokens in a chunk; 0 for all.
      policy: what each chunk keeps.
    """
    s = jax.tree.leaves(tokens)[0].shape[1]
    count = -(-s // chunk) if chunk else 1
    if count == 1:
        return body(tokens, jnp.int32(0))
    size = -(-s // count)

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, count * size - s)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)

    starts = size * jnp.arange(count, dtype=jnp.int32)
    run = jax.checkpoint(lambda xs: body(*xs), policy=policy, prevent_cse=False)
    y = jnp.moveaxis(lax.map(run, (jax.tree.map(split, tokens), starts)), 0, 1)
    return y.reshape(y.shape[0], count * size, *y.shape[3:])[:, :s]


class Block(nnx.Module):
    """x + mixer(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, config: Config, sizes: Sizes, mixer: nnx.Module, ffn: nnx.Module):
        self.config, self.sizes = config, sizes
        self.mixer, self.ffn = mixer, ffn
        self.mixer_norm_D = vector("D", (sizes.D,), 1.0)
        if self._has_ffn:
            self.ffn_norm_D = vector("D", (sizes.D,), 1.0)

    def __call__(self, x_BSD: jax.Array, contexts: dict[str, SequenceContext], layout: str, mixer_layout: str) -> jax.Array:
        """One layer.

        Args:
          x_BSD: hidden states in the stream's layout.
          contexts: layout -> context, for every layout that some layer uses.
          layout: the stream's layout, in which the result comes back as well.
          mixer_layout: in which the mixer runs.
        """
        ctx = contexts[layout]
        if self.config.fuse_attention:
            return self._fused(x_BSD, ctx)
        h_BSD = rms_norm(x_BSD, self.mixer_norm_D.get_value(), self.sizes.norm_eps)
        h_BSD = layouts.convert(h_BSD, layout, mixer_layout, mesh=ctx.mesh)
        y_BSD = layouts.convert(self.mixer(h_BSD, contexts[mixer_layout]), mixer_layout, layout, mesh=ctx.mesh)

        if not self._has_ffn:
            return x_BSD + y_BSD

        def feed_forward(w, x_BsD):
            body = lambda x_BCD, start: self._ffn(w, x_BCD)
            return token_loop(body, x_BsD, chunk=self.config.token_chunk, policy=remat.policy("minimal"))

        return tokenwise(feed_forward, self._ffn_weights(), x_BSD + y_BSD, mesh=ctx.mesh, dtype=x_BSD.dtype)

    def _fused(self, x_BSD: jax.Array, ctx: SequenceContext) -> jax.Array:
        normed_BSD = rms_norm(x_BSD, self.mixer_norm_D.get_value(), self.sizes.norm_eps)
        memory = self.mixer.prepare(normed_BSD, ctx)
        weights = self._ffn_weights() | {"mixer_norm_D": self.mixer_norm_D, "mixer": self.mixer.attend_weights()}
        tokens = {"x": x_BSD, "positions": ctx.positions_BS}
        if ctx.segments_BS is not None:
            tokens["segments"] = ctx.segments_BS

        def layer(w, tokens, memory):
            values, sums = widen(memory)

            def body(t, start):
                memory = joined(values, sums)
                x_BCD = t["x"]
                chunk = TokenChunk(t["positions"], t["segments"] if "segments" in t else None, contiguous(x_BCD.shape[1], start))
                h_BCD = rms_norm(x_BCD, w["mixer_norm_D"], self.sizes.norm_eps)
                return self._ffn(w, x_BCD + self.mixer.attend(w["mixer"], h_BCD, memory, chunk))

            return token_loop(body, tokens, chunk=self.config.token_chunk, policy=remat.policy(self.config.remat))

        return tokenwise(layer, weights, tokens, memory, mesh=ctx.mesh, dtype=x_BSD.dtype)

    @property
    def _has_ffn(self) -> bool:
        return bool(self.ffn.weights())

    def _ffn_weights(self) -> dict[str, Any]:
        return {} if not self._has_ffn else {"ffn_norm_D": self.ffn_norm_D, "ffn": self.ffn.weights()}

    def _ffn(self, w: dict[str, Any], x_BCD: jax.Array) -> jax.Array:
        if not self._has_ffn:
            return x_BCD
        return x_BCD + self.ffn.apply(w["ffn"], rms_norm(x_BCD, w["ffn_norm_D"], self.sizes.norm_eps))
