"""Which key tiles a query tile has work with, and the other way round, as a few intervals: what the kernels' loops run over.

Order grows within a run and documents are intervals of it, so the tiles of one run that a tile sees stand next to each other,
and so do those among them that need no mask. Only the tiles of sink tokens may stand apart, in front. Memory is in proportion
to the number of tiles, not of pairs; but with sinks, which are looked for in front of what was found, XLA may keep two bytes a
pair: none for two million tokens of a device, 128 MiB for four.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lcx.ops.tiling import Tiling
from lcx.ops.types import Mask, Segments
from lcx.ops.visibility import TileBounds, tile_full, tile_visible


class Ranges(NamedTuple):
    """Intervals of tiles, int32, of shape (rows, tiles, intervals); rows is 1 where no document ids tell batch rows apart.

    Attributes:
      low, high: tiles low <= j < high hold some pair that is seen.
      full_low, full_high: tiles in which every pair is.
    """

    low: jax.Array
    high: jax.Array
    full_low: jax.Array
    full_high: jax.Array

    def tiles(self) -> jax.Array:
        """How many tiles each tile is computed with: (rows, tiles)."""
        return jnp.sum(self.high - self.low, axis=-1)

    def packed(self) -> jax.Array:
        """int32 (rows, tiles, 4 intervals): low, high, full_low, full_high of every interval in turn."""
        rows, tiles, _ = self.low.shape
        return jnp.stack(self, axis=-1).reshape(rows, tiles, -1)


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Visibility of all pairs of tiles, evaluated where it is reduced; without sinks (rows, query tiles, key tiles) never exists.

    Attributes:
      mask: static visibility.
      tiling_q, tiling_k: how the sides are cut.
      segments: document ids and sink flags; None entries where there are none.
    """

    mask: Mask
    tiling_q: Tiling
    tiling_k: Tiling
    segments: Segments

    def over_keys(self) -> Ranges:
        """For every query tile: intervals of key tiles, one a run, and with sinks as many again for those outside the window."""
        return _ranges(*self._pairs(), self.tiling_k, behind=not self.mask.causal)

    def over_queries(self) -> Ranges:
        """For every key tile: intervals of query tiles, one a run. Those that see a sink come right after those in the window."""
        seen, full, sink = self._pairs()
        seen = seen if sink is None else seen | sink
        return _ranges(jnp.swapaxes(seen, 1, 2), jnp.swapaxes(full, 1, 2), None, self.tiling_q)

    def _pairs(self) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """(seen without sinks, seen in full, seen as a sink), each rows x query tiles x key tiles."""
        q_BS, k_BT, sink_BT = self.segments
        rows = 1 if q_BS is None and sink_BT is None else (q_BS if q_BS is not None else sink_BT).shape[0]
        split = lambda tiling, x: None if x is None else tiling.split(x)
        cut = (split(self.tiling_q, q_BS), split(self.tiling_k, k_BT), split(self.tiling_k, sink_BT))

        def of_row(row):
            seg_q, seg_k, sink = (None if x is None else lax.dynamic_slice_in_dim(x, row, 1, axis=1) for x in cut)
            q, k = self.tiling_q.bounds(seg_q), self.tiling_k.bounds(seg_k, sink)
            each_q = jax.vmap(lambda q, k: tile_visible(self.mask, q, k), in_axes=(0, None))
            seen = each_q(q, k._replace(sink=None))
            if sink is not None:
                everywhere = dataclasses.replace(self.mask, window=None)
                only = jax.vmap(lambda q, k: tile_visible(everywhere, q, k), in_axes=(0, None))(q, k._replace(sink=None))
                sinks = only & k.sink[None]
            else:
                sinks = jnp.zeros_like(seen)
            full = tile_full(self.mask, _column(q), _row(k))
            for seg, place in ((seg_q, (slice(None), None)), (seg_k, (None, slice(None)))):
                if seg is not None:
                    full = full & jnp.all(seg != 0, axis=(1, 2))[place]
            return seen, full, sinks

        seen, full, sinks = jax.vmap(of_row)(jnp.arange(rows))
        return seen, full, None if sink_BT is None else sinks


def _column(bounds: TileBounds) -> TileBounds:
    """Bounds that stand along the first of two dims; their one batch row is dropped."""
    return TileBounds(*(None if x is None else x.reshape(-1, 1) for x in bounds))


def _row(bounds: TileBounds) -> TileBounds:
    return TileBounds(*(None if x is None else x.reshape(1, -1) for x in bounds))


def _ranges(seen: jax.Array, full: jax.Array, sink: jax.Array | None, others: Tiling, behind: bool = False) -> Ranges:
    """Intervals of the last dim's tiles, run by run, as tile numbers of the shard; `behind`: sinks may follow the window."""
    by_run = lambda x: x.reshape(*x.shape[:2], others.runs.count, others.per_run)
    offset = others.per_run * jnp.arange(others.runs.count, dtype=jnp.int32)
    low, high = _hull(by_run(seen))
    full = by_run(full & seen)
    full_low, full_high = _hull(full)
    # Padding inside a document stands between tiles without: then all of them take the mask.
    full_high = jnp.where(jnp.sum(full, axis=-1) == full_high - full_low, full_high, full_low)
    found = [[low, high, full_low, full_high]]
    if sink is not None:
        sink, j = by_run(sink), lax.broadcasted_iota(jnp.int32, seen.shape[:2] + full.shape[2:], 3)
        nothing = jnp.zeros_like(low)
        in_front = sink & ((j < low[..., None]) | (low == high)[..., None])
        found.insert(0, [*_hull(in_front), nothing, nothing])
        if behind:
            found.append([*_hull(sink & (j >= high[..., None]) & (low != high)[..., None]), nothing, nothing])
    offset = jnp.tile(offset, len(found))
    found = [jnp.concatenate(parts, axis=-1) for parts in zip(*found, strict=True)]
    return Ranges(*(x + offset[None, None] for x in found))


def _hull(seen: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The interval [low, high) that holds every True of the last dim; low = high = 0 where there is none."""
    n = seen.shape[-1]
    j = lax.broadcasted_iota(jnp.int32, seen.shape, seen.ndim - 1)
    high = jnp.max(jnp.where(seen, j + 1, 0), axis=-1)
    return jnp.minimum(jnp.min(jnp.where(seen, j, n), axis=-1), high), high


# What the kernels make of them, scalar by scalar.


class Walk(NamedTuple):
    """The tiles of one side that a program needs.

    Attributes:
      total: how many.
      locate: t -> (tile, order of its first token, whether no pair is hidden).
    """

    total: jax.Array
    locate: Callable[[jax.Array], tuple[jax.Array, jax.Array, jax.Array]]


def walk(read: Callable[[int], jax.Array], numbers: int, starts: Any, tiling: Tiling) -> Walk:
    """The tiles of a program's intervals.

    Args:
      read: i -> the i-th of the program's `numbers` numbers, as `Ranges.packed` orders them; the intervals go through the runs in
        turn.
      numbers: 4 for each interval.
      starts: reference of the starts of the runs.
      tiling: of the side that is walked.
    """
    stride = tiling.runs.step * tiling.size
    intervals, total = [], jnp.int32(0)
    for i in range(numbers // 4):
        low, high, *full = (read(4 * i + x) for x in range(4))
        run = i % tiling.runs.count
        intervals.append((total, low - total, starts[run] - stride * run * tiling.per_run, *full))
        total = total + high - low

    def locate(t):
        _, shift, base, full_low, full_high = intervals[0]
        for since, *others in intervals[1:]:
            choose = lambda a, b, here=t >= since: jnp.where(here, a, b)
            shift, base, full_low, full_high = map(choose, others, (shift, base, full_low, full_high))
        tile = t + shift
        return tile, base + stride * tile, (full_low <= tile) & (tile < full_high)

    return Walk(total, locate)


def first_order(starts: Any, tiling: Tiling, tile: jax.Array) -> jax.Array:
    """Order of a tile's first token; `starts`: reference of the starts of the runs."""
    run = lax.div(tile, jnp.int32(tiling.per_run))
    return starts[run] + tiling.runs.step * tiling.size * (tile - run * tiling.per_run)
