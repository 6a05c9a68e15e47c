"""What the TPU attention kernels share: the scores of one pair of tiles, and the loop over the tiles that a program needs.

Scores stand with keys along sublanes and queries along lanes. What belongs to a query (its running maximum, its logsumexp, its
document) is then a row that broadcasts for free, and no reduction crosses lanes. They are in units of log2, so that a weight is
one exp2.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from lcx.ops.types import AttentionSpec, Mask
from pallas_kernels.attention_ranges import Walk
from pallas_kernels.mosaic_tpu import dot, to_sublanes

LOG2E = math.log2(math.e)
HIDDEN = -1e30  # finite, so that differences are
NO_DOCUMENT = -(2**31)  # of a padding query, and no key's
RETURNING = 3  # visits whose results are on their way in, being computed, and on their way back


class Tile(NamedTuple):
    """What the score of a pair of tiles depends on besides queries and keys; references or values in the chip."""

    first_q: jax.Array
    first_k: jax.Array
    documents_q_1b: jax.Array | None
    documents_k_1c: jax.Array | None
    sinks_1c: jax.Array | None
    slope: jax.Array | None


def scores(
    q_bK: jax.Array, k_cK: jax.Array, tile: Tile, *, spec: AttentionSpec, steps: tuple[int, int], masked: bool
) -> tuple[jax.Array, jax.Array | None]:
    """Scores (keys, queries) in units of log2, HIDDEN where hidden, and d(score)/d(q.k scale), None for 1.

    Args:
      q_bK, k_cK: queries and keys.
      tile: what else decides.
      spec: mask, scale, soft-cap.
      steps: distance in order between neighbouring queries, and keys.
      masked: False where no pair is hidden.
    """
    s, bend = dot(k_cK, q_bK, 1, 1), None
    if spec.softcap is None:
        s = s * (spec.scale * LOG2E)
    else:
        bent = jnp.tanh(s * (spec.scale / spec.softcap))
        s, bend = (spec.softcap * LOG2E) * bent, 1 - bent * bent
    if masked or tile.slope is not None:
        i = steps[0] * lax.broadcasted_iota(jnp.int32, s.shape, 1)
        j = steps[1] * lax.broadcasted_iota(jnp.int32, s.shape, 0)
        distance = (tile.first_q - tile.first_k) + (i - j)
    if tile.slope is not None:
        s = s - (tile.slope * LOG2E) * jnp.abs(distance).astype(jnp.float32)
    if masked and (visible := _visible(spec.mask, distance, tile)) is not None:
        s = jnp.where(visible, s, HIDDEN)
    return s, bend


def _visible(mask: Mask, distance, tile: Tile) -> jax.Array | None:
    """bool (keys, queries), as `lcx.ops.visibility.visible_BST` says it; None if every key is seen."""
    terms = []
    if mask.left is not None:
        terms.append(distance <= mask.left)
    if mask.right is not None and not mask.causal:
        terms.append(distance >= -mask.right)
    both = functools.partial(functools.reduce, jnp.logical_and)
    if terms and tile.sinks_1c is not None:
        terms = [both(terms) | (to_sublanes(tile.sinks_1c) != 0)]
    if mask.causal:
        terms.append(distance >= 0)
    if tile.documents_q_1b is not None:
        documents_q = jnp.where(tile.documents_q_1b == 0, NO_DOCUMENT, tile.documents_q_1b)
        terms.append(documents_q == to_sublanes(tile.documents_k_1c))
    return both(terms) if terms else None


def either(full: jax.Array, compute: Callable[[bool], None]) -> None:
    """compute(masked): without a mask where no pair is hidden."""
    pl.when(full)(lambda: compute(False))
    pl.when(jnp.logical_not(full))(lambda: compute(True))


def over_tiles(walk: Walk, copies, visit, members: int = 1, returned=None) -> None:
    """visit(t, member, first order, whether no pair is hidden) for each tile in turn, while the next one is copied.

    Args:
      walk: the tiles.
      copies: copies(tile, member, t) -> the copies that bring what visit t reads. Slots for two visits are enough, but for what
        is returned.
      visit: what is computed with it.
      members: how many times each tile is visited, for the query heads that share the keys.
      returned: the same for the copies that take back what visit t has changed, out of `RETURNING` slots; None changes nothing.
    """
    total = walk.total * members
    of = lambda copies, t: copies(walk.locate(t // members)[0], t % members, t)

    def wait(copies, t):
        for copy in of(copies, t):
            copy.wait()

    def step(t, _):
        @pl.when(t + 1 < total)
        def begin_next():
            if returned is not None:
                pl.when(t + 1 >= RETURNING)(lambda: wait(returned, t + 1 - RETURNING))
            for copy in of(copies, t + 1):
                copy.start()

        wait(copies, t)
        visit(t, t % members, *walk.locate(t // members)[1:])
        if returned is not None:
            for copy in of(returned, t):
                copy.start()

    @pl.when(total > 0)
    def begin():
        for copy in of(copies, jnp.int32(0)):
            copy.start()

    lax.fori_loop(jnp.int32(0), total, step, None)
    if returned is not None:
        lax.fori_loop(jnp.maximum(total - RETURNING, 0), total, lambda t, _: wait(returned, t), None)
