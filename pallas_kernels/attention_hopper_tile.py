"""What the Hopper attention kernels share: one call's arrays, the scores of a pair of tiles, the walk over the tiles that a
program needs.

What belongs to a token (document, sink) is read from global memory into registers, and only by tiles that need it.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lcx.ops.tiling import Tiling
from lcx.ops.types import AttentionSpec, Mask, Segments
from pallas_kernels.attention_ranges import Pairs
from pallas_kernels.mosaic_hopper import ROWS, along, load, per_token

LOG2E = math.log2(math.e)
# Units of log2. Both are finite, so that differences are; a hidden score is far enough below the maximum of a row that has
# seen nothing for exp2 to give 0.
HIDDEN, FLOOR = -1e25, -1e20
NO_DOCUMENT = -(2**31)  # of a padding query, and no key's


class Pair(NamedTuple):
    """What the scores of a pair of tiles depend on besides queries and keys; references stand in global memory.

    Attributes:
      first_q, first_k: order of the first query and key.
      full: whether no pair is hidden.
      documents_q, documents_k, sinks: references to one entry a query or key, or None.
      slope: of the ALiBi bias, or None.
    """

    first_q: jax.Array
    first_k: jax.Array
    full: jax.Array
    documents_q: Any
    documents_k: Any
    sinks: Any
    slope: jax.Array | None


class Scores(NamedTuple):
    """value * factor is the score in units of log2; bend is d(score)/d(q.k scale), None for 1.

    The factor stays apart so that it can join the subtraction of a maximum in one instruction.
    """

    value: jax.Array
    factor: float
    bend: jax.Array | None


def scores(products: jax.Array, pair: Pair, *, spec: AttentionSpec, steps: tuple[int, int], q_dim: int) -> Scores:
    """Scores of one pair of tiles.

    Args:
      products: q.k, fp32, queries along dim `q_dim`.
      pair: what else decides.
      spec: mask, scale, soft-cap.
      steps: distance in order between neighbouring queries, and keys.
      q_dim: 0 or 1.
    """
    value, factor, bend = products, spec.scale * LOG2E, None
    if spec.softcap is not None:
        bent, cap = tanh(value * (spec.scale / spec.softcap)), spec.softcap * LOG2E
        value, factor, bend = bent * cap, 1.0, 1 - bent * bent
    apart = functools.partial(_distance, products.shape, pair, steps, q_dim)
    if pair.slope is not None:
        near, far = apart()
        distance = jnp.abs(near.astype(jnp.float32) + far.astype(jnp.float32))
        value, factor = value * factor - (pair.slope * LOG2E) * distance, 1.0
    if spec.mask.causal or spec.mask.window is not None or pair.documents_q is not None:
        hide = lambda x: jnp.where(_visible(spec.mask, *apart(), pair, q_dim), x, HIDDEN / factor)
        value = lax.cond(pair.full, lambda x: x, hide, value)
    if spec.softcap is not None and pair.slope is None:
        bend = 1 - jnp.square(jnp.maximum(value * (1 / cap), -1.0))  # again, and no registers hold it while pairs are hidden
    return Scores(value, factor, bend)


def tanh(x: jax.Array) -> jax.Array:
    """tanh to fp32 precision around 0 and beyond: the chip's own instruction has 11 bits."""
    return 1 - 2 / (jnp.exp2(x * (2 * LOG2E)) + 1)


def _distance(shape, pair: Pair, steps: tuple[int, int], q_dim: int) -> tuple[jax.Array, jax.Array]:
    """(near, far), of which the sum is order of the query - order of the key.

    A thread holds columns c, c + 1 of every eight. Eights apart, `far` is a constant in each of its registers and `near` the
    same number in many, so that a comparison of the two takes one instruction and no register for the column.
    """
    iota = lambda dim: plgpu.layout_cast(lax.iota(jnp.int32, shape[dim]), per_token(dim))
    by_row, by_column = (step if dim == q_dim else -step for dim, step in ((0, steps[q_dim]), (1, steps[1 - q_dim])))
    near = (pair.first_q - pair.first_k) + along(by_row * iota(0), 0, shape) + along(by_column * (iota(1) & 7), 1, shape)
    return near, along(by_column * (iota(1) & ~7), 1, shape)


def _visible(mask: Mask, near: jax.Array, far: jax.Array, pair: Pair, q_dim: int) -> jax.Array:
    """bool, as `lcx.ops.visibility.visible_BST` says it; at least one of its terms is there."""
    read = lambda ref, dim: along(load(ref, dim), dim, near.shape)
    terms = []
    if mask.left is not None:
        terms.append(near <= mask.left - far)
    if mask.right is not None and not mask.causal:
        terms.append(near >= -mask.right - far)
    both = functools.partial(functools.reduce, jnp.logical_and)
    if terms and pair.sinks is not None:
        terms = [both(terms) | (read(pair.sinks, 1 - q_dim) != 0)]
    if mask.causal:
        terms.append(near >= -far)
    if pair.documents_q is not None:
        documents_q = load(pair.documents_q, q_dim)
        documents_q = along(jnp.where(documents_q == 0, NO_DOCUMENT, documents_q), q_dim, near.shape)
        terms.append(documents_q == read(pair.documents_k, 1 - q_dim))
    return both(terms)


# Which tiles, and where they are.


class Problem:
    """One call of a kernel: how both sides are cut, and the arrays that every kernel reads.

    Rows of the batch stand one after another, B S ... as (B S) ...: a copy of four dims would fold batch and head into one
    coordinate, in units of heads, and that can overflow.
    """

    def __init__(self, q_BSHK, k_BTGK, v_BTGK, spec: AttentionSpec, order_q, order_k, segments: Segments, slopes_H, tiles):
        self.spec = spec
        self.B, _, self.H, self.K = q_BSHK.shape
        self.G = k_BTGK.shape[2]
        self.q_tiles, self.k_tiles = (Tiling.of(order, size, size) for order, size in zip((order_q, order_k), tiles, strict=True))
        self.steps = self.q_tiles.runs.step, self.k_tiles.runs.step
        seg_q, seg_k, sink = segments
        if seg_q is None and self.k_tiles.padded:  # keys that pad a tile are hidden as padding tokens are
            seg_q, seg_k = (jnp.ones((self.B, order.size), jnp.int32) for order in (order_q, order_k))
        self.pairs = Pairs(spec.mask, self.q_tiles, self.k_tiles, Segments(seg_q, seg_k, sink))
        self.dtype = q_BSHK.dtype
        numbers = lambda tiling, x: None if x is None else self.flat(tiling, x.astype(jnp.int32))
        self.inputs = dict(
            q=self.flat(self.q_tiles, q_BSHK),
            k=self.flat(self.k_tiles, k_BTGK),
            v=self.flat(self.k_tiles, v_BTGK),
            documents_q=numbers(self.q_tiles, seg_q),
            documents_k=numbers(self.k_tiles, seg_k),
            sinks=numbers(self.k_tiles, sink),
            starts_q=order_q.starts.astype(jnp.int32),
            starts_k=order_k.starts.astype(jnp.int32),
            slopes=None if slopes_H is None else slopes_H.astype(jnp.float32),
        )

    def flat(self, tiling: Tiling, x: jax.Array) -> jax.Array:
        """B S ... -> (B S) ..., padded."""
        x = tiling.pad(x)
        return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])

    def unflat(self, tiling: Tiling, x: jax.Array) -> jax.Array:
        """The inverse of `flat`."""
        return tiling.unpad(x.reshape(self.B, -1, *x.shape[1:]))

    def numbers(self, x_BHS: jax.Array, fill: float) -> jax.Array:
        """fp32, padded, tokens last: one number a query and head."""
        return self.q_tiles.pad(x_BHS.astype(jnp.float32), fill, dim=2)

    def pair(self, refs, h, first_q, first_k, full, q_tokens, k_tokens) -> Pair:
        """What decides beside the products about a pair of tiles; tokens are slices of the flat arrays."""
        part = lambda ref, tokens: None if ref is None else ref.at[tokens]
        of_tokens = part(refs.documents_q, q_tokens), part(refs.documents_k, k_tokens), part(refs.sinks, k_tokens)
        return Pair(first_q, first_k, full, *of_tokens, None if refs.slopes is None else refs.slopes[h])

    def scores(self, products: jax.Array, pair: Pair, q_dim: int) -> Scores:
        """See `attention_hopper_tile.scores`."""
        return scores(products, pair, spec=self.spec, steps=self.steps, q_dim=q_dim)


def place(program: jax.Array, heads: int, tiles: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(batch row, head, tile) of a program. Heads are neighbours: those of a group read the same keys at the same time."""
    rest = lax.div(program, jnp.int32(heads))
    b = lax.div(rest, jnp.int32(tiles))
    return b, program - rest * heads, rest - b * tiles


def tokens_of(tiling: Tiling, tile: jax.Array, b: jax.Array | int = 0, w: jax.Array | int | None = None):
    """The tokens of a tile of batch row b in flat arrays; w: those of a warpgroup's rows only."""
    first = (b * tiling.count + tile) * tiling.size
    return pl.ds(first, tiling.size) if w is None else pl.ds(first + w * ROWS, ROWS)
