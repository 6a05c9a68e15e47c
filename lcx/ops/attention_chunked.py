"""Attention by tiles in plain `jnp`: linear memory, every platform, and tiles that the mask empties cost nothing.

For each query tile a loop goes from one visible key tile to the next. Source: Dao, "FlashAttention-2" (2023).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lcx.ops.tiling import Tiling
from lcx.ops.types import AttentionSpec, Segments
from lcx.ops.varying import alike
from lcx.ops.visibility import TileBounds, tile_visible, visible_BST

# Measured on two CPU cores, fp32, S=2048, K=16..64, H=4..16: 128, 256 and 512 lie within a third of each other, 256 is first
# or second everywhere; at 1024 the scores of a pair fall out of the cache and the time doubles.
TILE = 256
# Scores of one pair of tiles, over batch rows and heads, that exist at a time; more rows than that go one after another, and so
# do the copies of their queries and keys. From 1 MiB to 64 MiB the time is the same (two CPU cores, 512K tokens of LongNet).
SCORE_BYTES = 2**22


def refuse(spec, shapes, dtypes, device_kind):
    """Refuses orders that are not `Runs`: without intervals, every pair of tiles would have to be looked at."""
    for name in ("order_q", "order_k"):
        if name in shapes:
            return f"{name} is an array; it takes lcx.ops.Runs, only the reference takes arrays"
    return None


class Side(NamedTuple):
    """What a pair of tiles reads of one side; every leaf has the tiles in front."""

    bounds: TileBounds
    segments: jax.Array | None
    sink: jax.Array | None
    arrays: tuple[jax.Array, ...]


def _sides(q_arrays, k_arrays, order_q, order_k, segments: Segments):
    """Cuts both sides. `q_arrays` are (array B S ..., fill)."""
    tiling_q, tiling_k = Tiling.of(order_q, TILE), Tiling.of(order_k, TILE)
    seg_q, seg_k, sink = segments
    if seg_q is None and tiling_k.padded:  # keys that pad a tile are hidden as padding tokens are
        batch = k_arrays[0].shape[0]
        seg_q, seg_k = jnp.ones((batch, order_q.size), jnp.int32), jnp.ones((batch, order_k.size), jnp.int32)
    split = lambda tiling, x: None if x is None else tiling.split(x)
    seg_q, seg_k, sink = split(tiling_q, seg_q), split(tiling_k, seg_k), split(tiling_k, sink)
    q = Side(tiling_q.bounds(seg_q), seg_q, None, tuple(tiling_q.split(x, fill) for x, fill in q_arrays))
    k = Side(tiling_k.bounds(seg_k, sink), seg_k, sink, tuple(jnp.swapaxes(tiling_k.split(x), 2, 3) for x in k_arrays))
    return tiling_q, tiling_k, q, k


def _rows(tiles: jax.Array, G: int) -> jax.Array:
    """Query tiles B b H ... -> B G (R b) ...: the R heads of a group stand below one another, so K/V are never repeated."""
    n, B, b, H, *rest = tiles.shape
    return jnp.moveaxis(tiles.reshape(n, B, b, G, H // G, *rest), 2, 4).reshape(n, B, G, H // G * b, *rest)


def _unrows(tiles: jax.Array, b: int) -> jax.Array:
    """The inverse of `_rows`."""
    n, B, G, Rb, *rest = tiles.shape
    return jnp.moveaxis(tiles.reshape(n, B, G, Rb // b, b, *rest), 4, 2).reshape(n, B, b, G * (Rb // b), *rest)


def _for_visible(seen_n: jax.Array, body: Callable, state: Any) -> Any:
    """state = body(j, state) for every j that is seen, in increasing order; the others take no step."""
    n = seen_n.shape[0]
    index = jnp.arange(n, dtype=jnp.int32)
    after = lambda j: jnp.min(jnp.where(seen_n & (index > j), index, n))
    step = lambda loop: (after(loop[0]), body(loop[0], loop[1]))
    return lax.while_loop(lambda loop: loop[0] < n, step, (after(jnp.int32(-1)), state))[1]


def _pick(side: Any, j: jax.Array) -> Any:
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, j, keepdims=False), side)


def _dot(a: jax.Array, b: jax.Array, a_dim: int, b_dim: int) -> jax.Array:
    """Product over one dimension of two arrays B G . ., accumulated in fp32."""
    return lax.dot_general(a, b, (((a_dim,), (b_dim,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)


def _scores(q, k, tile_q, tile_k, tiling_q, tiling_k, spec: AttentionSpec, alibi_slopes_H):
    """Scores of one pair of tiles, B G (R b) c with -inf where hidden, and d(score)/d(q.k scale), None for 1."""
    B, G, rows, _ = q.shape
    grid = (B, G, rows // tiling_q.size, tiling_q.size, tiling_k.size)
    scores = (_dot(q, k, 3, 3) * spec.scale).reshape(grid)
    slope = None
    if spec.softcap is not None:
        bent = jnp.tanh(scores / spec.softcap)
        scores, slope = spec.softcap * bent, (1 - bent * bent).reshape(B, G, rows, -1)
    i, j = tiling_q.order(tile_q.bounds.first), tiling_k.order(tile_k.bounds.first)
    if alibi_slopes_H is not None:
        distance = jnp.abs(i[:, None] - j[None, :]).astype(jnp.float32)
        scores = scores - alibi_slopes_H.astype(jnp.float32).reshape(1, G, -1, 1, 1) * distance[None, None, None]
    visible = visible_BST(spec.mask, i, j, tile_q.segments, tile_k.segments, tile_k.sink)
    if visible is not None:
        scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    return scores.reshape(B, G, rows, -1), slope


def _by_rows(fn: Callable, arrays: Any) -> Any:
    """fn(arrays) for arrays of B rows, so many rows at a time that the scores of a pair of tiles stay within SCORE_BYTES."""
    q_BSHK, k_BTGK = arrays["q"], arrays["k"]
    (B, S, H, _), T = q_BSHK.shape, k_BTGK.shape[1]
    most = max(SCORE_BYTES // (4 * H * min(S, TILE) * min(T, TILE)), 1)
    rows = next(rows for rows in range(min(most, B), 0, -1) if B % rows == 0)
    if rows == B:
        return fn(arrays)
    out = lax.map(fn, jax.tree.map(lambda x: x.reshape(B // rows, rows, *x.shape[1:]), arrays))
    return jax.tree.map(lambda x: x.reshape(B, *x.shape[2:]), out)


def forward(q_BSHK, k_BTGK, v_BTGK, *, spec, order_q, order_k, segments, alibi_slopes_H=None, carry=None):
    """See `lcx.ops.attention`, "Backends"."""
    options = dict(spec=spec, order_q=order_q, order_k=order_k, alibi_slopes_H=alibi_slopes_H)
    arrays = dict(q=q_BSHK, k=k_BTGK, v=v_BTGK, segments=segments, carry=carry)
    return _by_rows(lambda x: _forward(x["q"], x["k"], x["v"], segments=x["segments"], carry=x["carry"], **options), arrays)


def _forward(q_BSHK, k_BTGK, v_BTGK, *, spec, order_q, order_k, segments, alibi_slopes_H, carry):
    G = k_BTGK.shape[2]
    start = () if carry is None else ((carry[0].astype(jnp.float32), 0), (jnp.swapaxes(carry[1], 1, 2), -jnp.inf))
    tiling_q, tiling_k, q_side, k_side = _sides(((q_BSHK, 0), *start), (k_BTGK, v_BTGK), order_q, order_k, segments)

    def query_tile(_, tile_q):
        q = tile_q.arrays[0]
        if carry is None:
            nothing = jnp.zeros(q.shape[:-1], jnp.float32)
            state = alike((jnp.zeros(q.shape, jnp.float32), nothing - jnp.inf, nothing), tile_q, k_side)
        else:
            _, o, lse = tile_q.arrays
            state = o, lse, (lse != -jnp.inf).astype(jnp.float32)

        def key_tile(j, state):
            o, top, total = state
            tile_k = _pick(k_side, j)
            k, v = tile_k.arrays
            scores, _ = _scores(q, k, tile_q, tile_k, tiling_q, tiling_k, spec, alibi_slopes_H)
            new_top = jnp.maximum(top, scores.max(-1))
            # A row that has seen nothing yet: exp(-inf - 0) = 0, where exp(-inf - -inf) would be NaN.
            finite = jnp.where(new_top == -jnp.inf, 0.0, new_top)
            p = jnp.exp(scores - finite[..., None])
            shrink = jnp.exp(top - finite)
            return o * shrink[..., None] + _dot(p.astype(v.dtype), v, 3, 2), new_top, total * shrink + p.sum(-1)

        o, top, total = _for_visible(tile_visible(spec.mask, tile_q.bounds, k_side.bounds), key_tile, state)
        return None, (o / jnp.where(total == 0, 1.0, total)[..., None], top + jnp.log(total))

    _, (o, lse) = lax.scan(query_tile, None, q_side._replace(arrays=tuple(_rows(x, G) for x in q_side.arrays)))
    o, lse = (tiling_q.join(_unrows(x, tiling_q.size)) for x in (o, lse))
    return o, jnp.swapaxes(lse, 1, 2)


def backward(q_BSHK, k_BTGK, v_BTGK, do_BSHK, lse_BHS, delta_BHS, *, spec, order_q, order_k, segments, alibi_slopes_H=None):
    """See `lcx.ops.attention`, "Backends". One pass over the pairs of tiles, five products each."""
    options = dict(spec=spec, order_q=order_q, order_k=order_k, alibi_slopes_H=alibi_slopes_H)
    arrays = dict(q=q_BSHK, k=k_BTGK, v=v_BTGK, do=do_BSHK, lse=lse_BHS, delta=delta_BHS, segments=segments)
    rows = ("q", "k", "v", "do", "lse", "delta")
    return _by_rows(lambda x: _backward(*(x[name] for name in rows), segments=x["segments"], **options), arrays)


def _backward(q_BSHK, k_BTGK, v_BTGK, do_BSHK, lse_BHS, delta_BHS, *, spec, order_q, order_k, segments, alibi_slopes_H):
    G = k_BTGK.shape[2]
    # lse = +inf makes every weight of an empty row exp(-inf) = 0, and of a row that pads a tile.
    lse_BSH = jnp.swapaxes(jnp.where(lse_BHS == -jnp.inf, jnp.inf, lse_BHS), 1, 2)
    q_arrays = ((q_BSHK, 0), (do_BSHK.astype(v_BTGK.dtype), 0), (lse_BSH, jnp.inf), (jnp.swapaxes(delta_BHS, 1, 2), 0))
    tiling_q, tiling_k, q_side, k_side = _sides(q_arrays, (k_BTGK, v_BTGK), order_q, order_k, segments)

    def query_tile(sums, tile_q):
        q, do, lse, delta = tile_q.arrays

        def key_tile(j, state):
            dq, dk_tiles, dv_tiles = state
            tile_k = _pick(k_side, j)
            k, v = tile_k.arrays
            scores, slope = _scores(q, k, tile_q, tile_k, tiling_q, tiling_k, spec, alibi_slopes_H)
            p = jnp.exp(scores - lse[..., None])
            ds = p * (_dot(do, v, 3, 3) - delta[..., None])
            ds = (ds if slope is None else ds * slope).astype(q.dtype)
            add = lambda tiles, x: lax.dynamic_update_index_in_dim(tiles, _pick(tiles, j) + x, j, 0)
            return dq + _dot(ds, k, 3, 2), add(dk_tiles, _dot(ds, q, 2, 2)), add(dv_tiles, _dot(p.astype(do.dtype), do, 2, 2))

        seen = tile_visible(spec.mask, tile_q.bounds, k_side.bounds)
        dq, *sums = _for_visible(seen, key_tile, (alike(jnp.zeros(q.shape, jnp.float32), sums), *sums))
        return tuple(sums), dq

    sums = alike(tuple(jnp.zeros(x.shape, jnp.float32) for x in k_side.arrays), q_side, k_side)
    (dk, dv), dq = lax.scan(query_tile, sums, q_side._replace(arrays=tuple(_rows(x, G) for x in q_side.arrays)))
    dk, dv = (tiling_k.join(jnp.swapaxes(x, 2, 3)) for x in (dk, dv))
    return tiling_q.join(_unrows(dq, tiling_q.size)) * spec.scale, dk * spec.scale, dv
