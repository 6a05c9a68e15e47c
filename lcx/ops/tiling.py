"""A shard's tokens cut into tiles.

A tile lies within one run, so its order is an interval and its visibility from another tile a comparison of four integers (and
of document ids), whatever device the start of the run stands for.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lcx.ops.types import Runs
from lcx.ops.visibility import NO_DOCUMENT, TileBounds


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How one side is cut: every run into `per_run` tiles of `size` tokens, the last one padded."""

    runs: Runs
    size: int
    per_run: int

    @classmethod
    def of(cls, runs: Runs, largest: int, multiple: int | None = None) -> "Tiling":
        """Equal tiles of at most `largest` tokens.

        `multiple`: what their size has to be a multiple of; None is 8, and nothing where one tile takes the whole run.
        """
        per_run = -(-runs.length // largest)
        size = -(-runs.length // per_run)
        if multiple is not None or per_run > 1:
            size = -(-size // (multiple or 8)) * (multiple or 8)
        return cls(runs, size, -(-runs.length // size))

    @property
    def count(self) -> int:
        """Number of tiles."""
        return self.runs.count * self.per_run

    @property
    def padded(self) -> bool:
        """Whether tiles hold tokens that are none."""
        return self.per_run * self.size != self.runs.length

    def pad(self, x: jax.Array, fill: Any = 0, dim: int = 1) -> jax.Array:
        """... S ... -> ... (count size) ..., with `fill` in the padding."""
        if not self.padded:
            return x
        before, rest = x.shape[:dim], x.shape[dim + 1 :]
        x = x.reshape(*before, self.runs.count, self.runs.length, *rest)
        widths = [(0, 0)] * x.ndim
        widths[dim + 1] = (0, self.per_run * self.size - self.runs.length)
        return jnp.pad(x, widths, constant_values=fill).reshape(*before, self.count * self.size, *rest)

    def unpad(self, x: jax.Array, dim: int = 1) -> jax.Array:
        """The inverse of `pad`."""
        if not self.padded:
            return x
        before, rest = x.shape[:dim], x.shape[dim + 1 :]
        x = x.reshape(*before, self.runs.count, self.per_run * self.size, *rest)
        return jax.lax.slice_in_dim(x, 0, self.runs.length, axis=dim + 1).reshape(*before, self.runs.size, *rest)

    def split(self, x: jax.Array, fill: Any = 0) -> jax.Array:
        """B S ... -> tiles B size ..., with `fill` in the padding."""
        return jnp.moveaxis(self.pad(x, fill).reshape(x.shape[0], self.count, self.size, *x.shape[2:]), 1, 0)

    def join(self, tiles: jax.Array) -> jax.Array:
        """tiles B size ... -> B S ...."""
        n, B, size, *rest = tiles.shape
        return self.unpad(jnp.moveaxis(tiles, 0, 1).reshape(B, n * size, *rest))

    def bounds(self, segments_tiles: jax.Array | None, sink_tiles: jax.Array | None = None) -> TileBounds:
        """Extremes of every tile; arguments as `split` gives them."""
        offset = self.size * jnp.arange(self.per_run, dtype=jnp.int32)
        tokens = jnp.minimum(self.size, self.runs.length - offset)
        first = self.runs.starts[:, None].astype(jnp.int32) + self.runs.step * offset[None]
        last = first + self.runs.step * (tokens - 1)[None]
        low = high = sink = None
        if segments_tiles is not None:
            low = jnp.min(jnp.where(segments_tiles == 0, NO_DOCUMENT, segments_tiles), axis=2)
            high = jnp.max(segments_tiles, axis=2)
        if sink_tiles is not None:
            sink = jnp.any(sink_tiles, axis=(1, 2))
        return TileBounds(first.reshape(-1), last.reshape(-1), low, high, sink)

    def order(self, first: jax.Array) -> jax.Array:
        """int32 order of the tokens of the tile that begins at `first`."""
        return first + self.runs.step * jnp.arange(self.size, dtype=jnp.int32)
