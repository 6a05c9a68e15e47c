"""Attention for TPU (Pallas Mosaic): forward, and all gradients in one pass of five products.

One program computes a tile of queries (for gradients: of keys) against the tiles that it sees and no others: their numbers come
as intervals (`attention_ranges`), and a loop copies tile after tile into the chip, the next one while the last is computed. A
tile whose every pair is seen is computed without a mask. A carried partial is where the running softmax starts from.

Sources: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018); Dao, "FlashAttention-2" (2023).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lcx.ops.tiling import Tiling
from lcx.ops.types import AttentionSpec, Runs, Segments
from pallas_kernels import tiles
from pallas_kernels.attention_ranges import Pairs, Ranges, Walk, first_order, walk
from pallas_kernels.attention_support import unsuitable
from pallas_kernels.attention_tpu_tile import HIDDEN, LOG2E, RETURNING, Tile, either, over_tiles, scores
from pallas_kernels.mosaic_tpu import Operand, dot, launch, not_for, scalars

HEAD_WIDTHS = (64, 80, 96, 128, 256)
LANES = 128
# Copies of zeros under way at a time.
CLEARED = 8
# The maximum of a row that has seen nothing: hidden scores are far enough below it for exp2 to give 0.
FLOOR = HIDDEN / 10


def tile_sizes(dtype: jnp.dtype) -> tuple[int, int]:
    """Tokens in a tile of queries and of keys."""
    return tiles.tile_sizes(f"tpu_{jnp.dtype(dtype)}")


def refuse(spec, shapes, dtypes, device_kind):
    """TPUs only; orders as `Runs`; head widths that fill the matrix unit's rows."""
    return not_for(device_kind) or unsuitable(shapes, dtypes, HEAD_WIDTHS, (jnp.bfloat16, jnp.float32))


class Problem:
    """One call: how both sides are cut, and the arrays that every kernel reads, heads in front of tokens."""

    def __init__(self, q_BSHK, k_BTGK, v_BTGK, spec: AttentionSpec, order_q: Runs, order_k: Runs, segments: Segments, slopes_H):
        self.spec = spec
        self.B, _, self.H, self.K = q_BSHK.shape
        self.G = k_BTGK.shape[2]
        size_q, size_k = tile_sizes(q_BSHK.dtype)
        self.q_tiles, self.k_tiles = Tiling.of(order_q, size_q, LANES), Tiling.of(order_k, size_k, LANES)
        seg_q, seg_k, sink = segments
        if seg_q is None and self.k_tiles.padded:  # keys that pad a tile are hidden as padding tokens are
            seg_q, seg_k = (jnp.ones((self.B, order.size), jnp.int32) for order in (order_q, order_k))
        self.pairs = Pairs(spec.mask, self.q_tiles, self.k_tiles, Segments(seg_q, seg_k, sink))
        row = lambda tiling, x: None if x is None else tiling.pad(x.astype(jnp.int32))[:, None, :]
        self.q, self.documents_q = self.heads_first(q_BSHK, self.q_tiles), row(self.q_tiles, seg_q)
        self.k, self.v = self.heads_first(k_BTGK, self.k_tiles), self.heads_first(v_BTGK, self.k_tiles)
        self.documents_k, self.sinks = row(self.k_tiles, seg_k), row(self.k_tiles, sink)
        starts = dict(starts_q=scalars(order_q.starts), starts_k=scalars(order_k.starts))
        self.common = starts | dict(slopes=scalars(None if slopes_H is None else slopes_H.astype(jnp.float32)))

    def heads_first(self, x_BSHK: jax.Array, tiling: Tiling) -> jax.Array:
        """B S H K -> B H S K, padded."""
        return tiling.pad(jnp.swapaxes(x_BSHK, 1, 2), dim=2)

    def tokens_first(self, x_BHSK: jax.Array, tiling: Tiling) -> jax.Array:
        """The inverse of `heads_first`."""
        return jnp.swapaxes(tiling.unpad(x_BHSK, dim=2), 1, 2)

    def rows(self, x_BHS: jax.Array, fill: float) -> jax.Array:
        """B H S -> B H 1 S, padded: what stands as a row beside each tile of queries."""
        return self.q_tiles.pad(x_BHS.astype(jnp.float32), fill, dim=2)[:, :, None, :]

    def cost(self, products: int) -> pl.CostEstimate:
        """Of a kernel that takes `products` products for each pair of tiles, on the pairs of a diagonal block."""
        mask, S, T = self.spec.mask, self.q.shape[2], self.k.shape[2]
        seen = T if mask.left is None or mask.right is None else min(T, mask.left + mask.right + 1)
        pairs = self.B * self.H * S * (seen // 2 if mask.causal and seen == T else seen)
        moved = sum(x.size * x.dtype.itemsize for x in (self.q, self.k, self.v))
        return pl.CostEstimate(flops=2 * products * pairs * self.K, transcendentals=pairs, bytes_accessed=2 * moved)

    def scores(self, q_bK, k_cK, tile: Tile, masked: bool):
        """See `attention_tpu_tile.scores`."""
        steps = self.q_tiles.runs.step, self.k_tiles.runs.step
        return scores(q_bK, k_cK, tile, spec=self.spec, steps=steps, masked=masked)


def forward(q_BSHK, k_BTGK, v_BTGK, *, spec, order_q, order_k, segments, alibi_slopes_H=None, carry=None):
    """See `lcx.ops.attention`, "Backends". The result takes the memory of a carry."""
    p = Problem(q_BSHK, k_BTGK, v_BTGK, spec, order_q, order_k, segments, alibi_slopes_H)
    o, lse = (
        (None, None) if carry is None else (p.heads_first(carry[0].astype(jnp.float32), p.q_tiles), p.rows(carry[1], -jnp.inf))
    )
    B, H, S, K = p.q.shape
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32)
    row = pltpu.VMEM((1, p.q_tiles.size), jnp.float32)
    keys, slots = _streamed_keys(p)
    found = launch(
        functools.partial(_forward_kernel, p),
        "lcx_attention_forward",
        grid=(B, H, p.q_tiles.count),
        inputs=p.common | keys | _of_queries(p, q=p.q, documents_q=p.documents_q, carry_o=o, carry_lse=lse),
        outputs=_of_queries(p, o=shape(B, H, S, K), lse=shape(B, H, 1, S)),
        scratch=slots | dict(sum_o=pltpu.VMEM((K, p.q_tiles.size), jnp.float32), top=row, total=row),
        cost=p.cost(products=2),
        aliases={} if carry is None else dict(carry_o="o", carry_lse="lse"),
    )
    return p.tokens_first(found["o"], p.q_tiles), p.q_tiles.unpad(found["lse"][:, :, 0], dim=2)


def _forward_kernel(p: Problem, refs) -> None:
    if refs.carry_o is None:
        refs.sum_o[...] = jnp.zeros(refs.sum_o.shape, jnp.float32)
        refs.top[...] = jnp.full(refs.top.shape, FLOOR)
        refs.total[...] = jnp.zeros(refs.total.shape, jnp.float32)
    else:
        lse = refs.carry_lse[...]
        refs.sum_o[...] = refs.carry_o[...].T
        refs.top[...] = jnp.maximum(lse * LOG2E, FLOOR)
        refs.total[...] = jnp.where(lse == -jnp.inf, 0.0, 1.0)

    def step(k_cK, v_cK, tile, masked):
        s_cb, _ = p.scores(refs.q[...], k_cK, tile, masked)
        before = refs.top[...]
        top = jnp.maximum(before, jnp.max(s_cb, axis=0, keepdims=True))
        weights_cb, shrink = jnp.exp2(s_cb - top), jnp.exp2(before - top)
        refs.top[...] = top
        refs.total[...] = refs.total[...] * shrink + jnp.sum(weights_cb, axis=0, keepdims=True)
        refs.sum_o[...] = refs.sum_o[...] * shrink + dot(v_cK, weights_cb.astype(v_cK.dtype), 0, 0)

    _over_keys(p, refs, step)
    total = refs.total[...]
    nothing = total == 0
    refs.o[...] = (refs.sum_o[...] / jnp.where(nothing, 1.0, total)).T
    refs.lse[...] = jnp.where(nothing, -jnp.inf, (refs.top[...] + jnp.log2(jnp.where(nothing, 1.0, total))) / LOG2E)


def backward(q_BSHK, k_BTGK, v_BTGK, do_BSHK, lse_BHS, delta_BHS, *, spec, order_q, order_k, segments, alibi_slopes_H=None):
    """See `lcx.ops.attention`, "Backends"."""
    p = Problem(q_BSHK, k_BTGK, v_BTGK, spec, order_q, order_k, segments, alibi_slopes_H)
    # lse = +inf makes every weight of an empty row exp2(-inf) = 0, and of a row that pads a tile.
    lse = p.rows(jnp.where(lse_BHS == -jnp.inf, jnp.inf, lse_BHS * LOG2E), jnp.inf)
    rows = dict(do=p.heads_first(do_BSHK.astype(v_BTGK.dtype), p.q_tiles), lse=lse, delta=p.rows(delta_BHS, 0.0))
    found = _gradients(p, rows)
    return p.tokens_first(found["dq"], p.q_tiles), *(p.tokens_first(found[name], p.k_tiles) for name in ("dk", "dv"))


def _gradients(p: Problem, rows: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Every key tile against the queries of all heads that share it, one after another.

    dk and dv of the tile stay in the chip. dq stands in HBM; its tiles come, are added to and go back. The programs of a head run
    in order, so no two add to one sum at a time, and the order of the additions is always the same.
    """
    members, c = p.H // p.G, p.k_tiles.size
    streamed = dict(q=p.q, documents_q=p.documents_q, **rows)
    of_keys = lambda x: Operand(x, pl.BlockSpec((None, None, c, p.K), lambda b, g, j: (b, g, j, 0)))
    row_of_keys = lambda x: Operand(x, pl.BlockSpec((None, 1, c), lambda b, g, j: (b, 0, j)))
    own = dict(k=of_keys(p.k), v=of_keys(p.v), documents_k=row_of_keys(p.documents_k), sinks=row_of_keys(p.sinks))
    dkv = of_keys(jax.ShapeDtypeStruct(p.k.shape, jnp.float32))
    dq = Operand(jax.ShapeDtypeStruct(p.q.shape, jnp.float32))

    def kernel(refs):
        b, g, j = (pl.program_id(dim) for dim in range(3))
        first_k = first_order(refs.starts_k, p.k_tiles, j)
        refs.dk[...] = jnp.zeros(refs.dk.shape, jnp.float32)
        refs.dv[...] = jnp.zeros(refs.dv.shape, jnp.float32)
        head = lambda member: g * members + member
        pl.when(j == 0)(lambda: _clear(refs, lambda member: (b, head(member)), members, p.q_tiles))

        def copies(tile, member, t):
            place = lambda name: (b,) if name == "documents_q" else (b, head(member))
            added = pltpu.make_async_copy(*_sum(refs, (b, head(member)), p.q_tiles, tile, t), refs.added.at[t % 2])
            return [*_copies(refs, streamed, p.q_tiles, place, tile, t % 2), added]

        def returned(tile, member, t):
            array, slot = _sum(refs, (b, head(member)), p.q_tiles, tile, t)
            return [pltpu.make_async_copy(slot, array, refs.returned.at[t % RETURNING])]

        def visit(t, member, first_q, full):
            slot = t % 2
            slope = None if refs.slopes is None else refs.slopes[head(member)]
            documents_q = None if refs.documents_q is None else refs.documents_q_slots[slot]
            tile = Tile(first_q, first_k, documents_q, _whole(refs.documents_k), _whole(refs.sinks), slope)

            def compute(masked):
                q_bK, k_cK, do_bK = refs.q_slots[slot], refs.k[...], refs.do_slots[slot]
                s_cb, bend = p.scores(q_bK, k_cK, tile, masked)
                weights_cb = jnp.exp2(s_cb - refs.lse_slots[slot])
                ds_cb = weights_cb * (dot(refs.v[...], do_bK, 1, 1) - refs.delta_slots[slot])
                ds_cb = (ds_cb if bend is None else ds_cb * bend).astype(q_bK.dtype)
                refs.dv[...] += dot(weights_cb.astype(do_bK.dtype), do_bK, 1, 0)
                refs.dk[...] += dot(ds_cb, q_bK, 1, 0)
                refs.dq_slots[t % RETURNING] += dot(k_cK, ds_cb, 0, 0).T * p.spec.scale

            either(full, compute)

        over_tiles(_walk(refs.ranges, refs.starts_q, p.q_tiles), copies, visit, members, returned)
        refs.dk[...] *= p.spec.scale

    semaphores = dict(added=pltpu.SemaphoreType.DMA((2,)), returned=pltpu.SemaphoreType.DMA((RETURNING,)))
    return launch(
        kernel,
        "lcx_attention_backward",
        grid=(p.B, p.G, p.k_tiles.count),
        inputs=p.common | {name: Operand(x) for name, x in streamed.items()} | own | _intervals(p.pairs.over_queries()),
        outputs=dict(dq=dq, dk=dkv, dv=dkv),
        scratch=_slots(streamed, p.q_tiles)
        | dict(dq_slots=pltpu.VMEM((RETURNING, p.q_tiles.size, p.K), jnp.float32), **semaphores),
        cost=p.cost(products=5),
    )


def _sum(refs, place: tuple, tiling: Tiling, tile: jax.Array, t: jax.Array) -> tuple:
    """(the tile of dq in HBM, where it is added to)."""
    tokens = pl.ds(pl.multiple_of(tile * tiling.size, tiling.size), tiling.size)
    return refs.dq.at[place].at[tokens], refs.dq_slots.at[t % RETURNING]


def _clear(refs, place: Callable[[jax.Array], tuple], members: int, tiling: Tiling) -> None:
    """Zeros in every tile of dq of the heads that share the keys. Here: a pass of XLA would be one to hide transfers behind."""
    refs.dq_slots[0] = jnp.zeros(refs.dq_slots.shape[1:], jnp.float32)

    def copy(i):
        array, zeros = _sum(refs, place(i // tiling.count), tiling, i % tiling.count, 0)
        return pltpu.make_async_copy(zeros, array, refs.returned.at[0])

    def step(i, _):
        pl.when(i >= CLEARED)(lambda: copy(i - CLEARED).wait())
        copy(i).start()

    n = members * tiling.count
    lax.fori_loop(0, n, step, None)
    lax.fori_loop(max(n - CLEARED, 0), n, lambda i, _: copy(i).wait(), None)


# What the references are, and what is streamed past a program.


def _of_queries(p: Problem, **arrays) -> dict[str, Operand]:
    """The program's tile of queries of arrays B H S K, B H 1 S or B 1 S."""
    b = p.q_tiles.size
    per_batch_row = pl.BlockSpec((None, 1, b), lambda n, h, i: (n, 0, i))
    per_head = pl.BlockSpec((None, None, 1, b), lambda n, h, i: (n, h, 0, i))
    vectors = pl.BlockSpec((None, None, b, p.K), lambda n, h, i: (n, h, i, 0))
    spec = lambda x: None if x is None else per_batch_row if len(x.shape) == 3 else per_head if x.shape[2] == 1 else vectors
    return {name: Operand(x, spec(x)) for name, x in arrays.items()}


def _intervals(ranges: Ranges) -> dict[str, Operand]:
    """The program's row of intervals, in scalar memory."""
    packed = ranges.packed()[:, :, None, :]
    row = (lambda n: 0) if packed.shape[0] == 1 else (lambda n: n)
    spec = pl.BlockSpec((None, None, 1, packed.shape[3]), lambda n, h, i: (row(n), i, 0, 0), memory_space=pltpu.SMEM)
    return dict(ranges=Operand(packed, spec))


def _streamed_keys(p: Problem) -> tuple[dict[str, Operand], dict]:
    """Keys, values and what is known about them, in HBM; which tiles of them; and room for two."""
    arrays = dict(k=p.k, v=p.v, documents_k=p.documents_k, sinks=p.sinks)
    return {name: Operand(x) for name, x in arrays.items()} | _intervals(p.pairs.over_keys()), _slots(arrays, p.k_tiles)


def _slots(arrays: dict[str, jax.Array | None], tiling: Tiling) -> dict:
    """Room for two tiles of every array B H S K, B H 1 S or B 1 S."""
    shape = lambda x: (2, 1, tiling.size) if x.shape[-2] == 1 else (2, tiling.size, x.shape[-1])
    slots = {f"{name}_slots": None if x is None else pltpu.VMEM(shape(x), x.dtype) for name, x in arrays.items()}
    return slots | dict(copied=pltpu.SemaphoreType.DMA((2, len(slots))))


def _copies(refs, names, tiling: Tiling, place: Callable[[str], tuple], tile: jax.Array, slot: jax.Array) -> list:
    """The copies of one tile of every array that is there; `place(name)`: its index in the dims before the tokens."""
    found = []
    for name in names:
        if (source := getattr(refs, name)) is not None:
            source, tokens = source.at[place(name)], pl.ds(pl.multiple_of(tile * tiling.size, tiling.size), tiling.size)
            source = source.at[:, tokens] if source.shape[0] == 1 else source.at[tokens]
            slots = getattr(refs, f"{name}_slots")
            found.append(pltpu.make_async_copy(source, slots.at[slot], refs.copied.at[slot, len(found)]))
    return found


def _walk(ranges, starts, tiling: Tiling) -> Walk:
    """The tiles of the program's row of intervals."""
    return walk(lambda i: ranges[0, i], ranges.shape[1], starts, tiling)


def _whole(ref):
    return None if ref is None else ref[...]


def _over_keys(p: Problem, refs, step: Callable[[jax.Array, jax.Array, Tile, bool], None]) -> None:
    """step(k_cK, v_cK, tile, masked) for every key tile that this program's queries see."""
    n, h, i = (pl.program_id(dim) for dim in range(3))
    first_q = first_order(refs.starts_q, p.q_tiles, i)
    place = lambda name: (n, h // (p.H // p.G)) if name in ("k", "v") else (n,)

    def visit(t, _, first_k, full):
        slot = t % 2
        read = lambda ref: None if ref is None else ref[slot]
        slope = None if refs.slopes is None else refs.slopes[h]
        rows = _whole(refs.documents_q), read(refs.documents_k_slots), read(refs.sinks_slots)
        tile = Tile(first_q, first_k, *rows, slope)
        either(full, lambda masked: step(refs.k_slots[slot], refs.v_slots[slot], tile, masked))

    copies = lambda tile, _, t: _copies(refs, ("k", "v", "documents_k", "sinks"), p.k_tiles, place, tile, t % 2)
    over_tiles(_walk(refs.ranges, refs.starts_k, p.k_tiles), copies, visit)
