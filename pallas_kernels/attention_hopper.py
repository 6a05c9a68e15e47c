"""Attention for Hopper GPUs (Pallas Mosaic GPU): forward, gradient of the queries, gradients of keys and values.

One program computes a tile of queries (of keys, for dk and dv) against the tiles that it sees and no others: their numbers come
as intervals (`attention_ranges`). One warpgroup copies tile after tile into rings of shared memory and the others compute, each
for 64 rows of the program's tile. A tile whose every pair is seen is computed without a mask. Arrays keep the layout in which
they come, tokens before heads: a copy picks one head of a tile of tokens by its coordinates.

Sources: Dao, "FlashAttention-2" (2023); Shah et al., "FlashAttention-3" (2024), for the division of labour among warpgroups.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from lcx.ops.tiling import Tiling
from pallas_kernels import interpret, tiles
from pallas_kernels.attention_hopper_tile import FLOOR, LOG2E, Problem, place, tokens_of
from pallas_kernels.attention_ranges import Walk, first_order, walk
from pallas_kernels.attention_support import unsuitable
from pallas_kernels.mosaic_hopper import ROWS, Ring, add_product, along, constant, launch, load, matrices, product, stream

HEAD_WIDTHS = (64, 128, 256)
DEVICES = ("H100", "H200", "GH200")
STAGES = 2
TOKENS_LIMIT = 2**30


class Sizes(NamedTuple):
    """How a kernel divides its work.

    Attributes:
      computing: warpgroups that compute, 64 rows each.
      across: tokens in a tile of the side that is streamed past them.
    """

    computing: int
    across: int

    @property
    def own(self) -> int:
        """Tokens in a tile of the program's own side."""
        return ROWS * self.computing


def sizes(kernel: str, K: int) -> Sizes:
    """For head width K; see `tiles`."""
    own, across = tiles.tile_sizes(f"hopper_{kernel}_{K}")
    return Sizes(own // ROWS, across)


def refuse(spec, shapes, dtypes, device_kind):
    """Hopper GPUs only; orders as `Runs`; head widths that fill the tiles of shared memory; 16-bit operands."""
    if not any(name in device_kind for name in DEVICES) and not interpret.mode():
        return f"it is for {', '.join(DEVICES)} and this is {device_kind}"
    if reason := unsuitable(shapes, dtypes, HEAD_WIDTHS, (jnp.bfloat16, jnp.float16)):
        return reason
    for name in ("q", "k"):
        if (tokens := shapes[name][0] * shapes[name][1]) > TOKENS_LIMIT:
            return f"{name} has {tokens} tokens in all rows; their numbers are 32-bit coordinates and it takes {TOKENS_LIMIT}"
    return None


def _walk(ranges, b: jax.Array, tile: jax.Array, starts, tiling: Tiling) -> Walk:
    """The tiles that a program's tile of batch row b needs."""
    row = b if ranges.shape[0] > 1 else 0
    return walk(lambda i: ranges[row, tile, i], ranges.shape[2], starts, tiling)


class _Queries:
    """What the two kernels share whose programs stand for queries: where they are, and the walk over their keys."""

    def __init__(self, p: Problem, refs, program: jax.Array):
        self.p, self.refs = p, refs
        self.b, self.h, tile = place(program, p.H, p.q_tiles.count)
        self.tile = p.q_tiles.count - 1 - tile  # with a causal mask the longest first, so that none is left to run alone
        self.g = lax.div(self.h, jnp.int32(p.H // p.G))
        self.walk = _walk(refs.ranges, self.b, self.tile, refs.starts_k, p.k_tiles)
        self.keys, self.values = Ring(refs, "k"), Ring(refs, "v")

    def rows(self, w: jax.Array | int):
        """Where warpgroup w's queries are in flat arrays (B S) H K."""
        return tokens_of(self.p.q_tiles, self.tile, self.b, w), self.h

    def numbers(self, w: jax.Array | int):
        """Where they are in arrays B H S."""
        return self.b, self.h, tokens_of(self.p.q_tiles, self.tile, w=w)

    def copy(self, own: dict[str, str], computing: int) -> None:
        """Copies the queries' own matrices, input -> scratch, then keys and values."""
        for source, target in own.items():
            for w in range(computing):
                rows = getattr(self.refs, source).at[self.rows(w)]
                plgpu.copy_gmem_to_smem(rows, getattr(self.refs, target).at[w], self.refs.own_filled)
        tile = lambda ref: lambda t: [ref.at[tokens_of(self.p.k_tiles, self.walk.locate(t)[0], self.b), self.g]]
        stream(self.walk.total, [(self.keys, tile(self.refs.k)), (self.values, tile(self.refs.v))])

    def visit(self, w: jax.Array, q_own, t: jax.Array):
        """(keys, scores) of step t for warpgroup w, whose queries are `q_own`."""
        p, refs = self.p, self.refs
        tile, first_k, full = self.walk.locate(t)
        first_q = first_order(refs.starts_q, p.q_tiles, self.tile) + w * (ROWS * p.steps[0])
        tokens = self.rows(w)[0], tokens_of(p.k_tiles, tile, self.b)
        pair = p.pair(refs, self.h, first_q, first_k, full, *tokens)
        (k,) = self.keys.receive(t)
        return k, p.scores(product(q_own, k.transpose((1, 0))), pair, q_dim=0)


def _query_kernel(p: Problem, kernel: str, own: tuple[str, ...]) -> dict:
    """Arguments of `launch` for programs that stand for queries."""
    computing, across = sizes(kernel, p.K)
    scratch = {f"{name}_own": matrices(computing, ROWS, p.K, p.dtype) for name in own}
    scratch |= dict(own_filled=plgpu.Barrier(num_arrivals=len(own) * computing))
    for name in ("k", "v"):
        scratch |= Ring.scratch(computing, **{name: matrices(STAGES, across, p.K, p.dtype)})
    return dict(programs=p.B * p.H * p.q_tiles.count, computing=computing, scratch=scratch)


def forward(q_BSHK, k_BTGK, v_BTGK, *, spec, order_q, order_k, segments, alibi_slopes_H=None, carry=None):
    """See `lcx.ops.attention`, "Backends"."""
    size = sizes("forward", q_BSHK.shape[3])
    tiles = size.own, size.across
    p = Problem(q_BSHK, k_BTGK, v_BTGK, spec, order_q, order_k, segments, alibi_slopes_H, tiles)
    carried = dict(carry_o=None, carry_lse=None)
    if carry is not None:
        carried = dict(carry_o=p.flat(p.q_tiles, carry[0].astype(jnp.float32)), carry_lse=p.numbers(carry[1], -jnp.inf))

    def kernel(refs, program):
        at = _Queries(p, refs, program)
        return lambda: at.copy(dict(q="q_own"), size.computing), lambda w: _forward(at, w)

    fp32 = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32)
    found = launch(
        kernel,
        "lcx_attention_forward",
        inputs=p.inputs | carried | dict(ranges=p.pairs.over_keys().packed()),
        outputs=dict(o=fp32(*p.inputs["q"].shape), lse=fp32(p.B, p.H, p.q_tiles.count * p.q_tiles.size)),
        **_query_kernel(p, "forward", own=("q",)),
    )
    return p.unflat(p.q_tiles, found["o"]), p.q_tiles.unpad(found["lse"], dim=2)


def _forward(at: _Queries, w: jax.Array) -> None:
    """What one warpgroup computes for its queries."""
    p, refs = at.p, at.refs
    plgpu.barrier_wait(refs.own_filled)
    tile = (ROWS, p.K)

    def step(t, sums):
        sum_o, top, total = sums
        k, s = at.visit(w, refs.q_own.at[w], t)
        at.keys.release(t)
        raised = jnp.maximum(top, jnp.max(s.value, axis=1) * s.factor)
        weights = jnp.exp2(s.value * s.factor - along(raised, 0, s.value.shape))
        shrink = jnp.exp2(top - raised)
        total = total * shrink + jnp.sum(weights, axis=1)
        sum_o = sum_o * along(shrink, 0, tile)
        (v,) = at.values.receive(t)
        sum_o = add_product(sum_o, weights.astype(p.dtype), v)
        at.values.release(t)
        return sum_o, raised, total

    start = constant(0.0, tile), constant(FLOOR, (ROWS,)), constant(0.0, (ROWS,))
    sum_o, top, total = lax.fori_loop(jnp.int32(0), at.walk.total, step, start)

    o_ref, lse_ref = refs.o.at[at.rows(w)], refs.lse.at[at.numbers(w)]
    if refs.carry_o is not None:
        carried = load(refs.carry_lse.at[at.numbers(w)], 0) * LOG2E
        raised = jnp.maximum(top, carried)
        mine, theirs = jnp.exp2(top - raised), jnp.exp2(carried - raised)
        carry_o = plgpu.load(refs.carry_o.at[at.rows(w)], layout=plgpu.Layout.WGMMA, optimized=False)
        sum_o = sum_o * along(mine, 0, tile) + carry_o * along(theirs, 0, tile)
        top, total = raised, total * mine + theirs
    nothing = total == 0.0
    total = jnp.where(nothing, 1.0, total)
    o_ref[...] = sum_o * along(1.0 / total, 0, tile)
    lse_ref[...] = jnp.where(nothing, -jnp.inf, (top + jnp.log2(total)) * (1 / LOG2E))


def backward(q_BSHK, k_BTGK, v_BTGK, do_BSHK, lse_BHS, delta_BHS, *, spec, order_q, order_k, segments, alibi_slopes_H=None):
    """See `lcx.ops.attention`, "Backends"."""
    rows = do_BSHK.astype(v_BTGK.dtype), lse_BHS, delta_BHS
    problem = lambda tiles: Problem(q_BSHK, k_BTGK, v_BTGK, spec, order_q, order_k, segments, alibi_slopes_H, tiles)
    K = q_BSHK.shape[3]
    size = sizes("dq", K)
    dq = _query_gradient(problem((size.own, size.across)), rows)
    size = sizes("dkv", K)
    p = problem((size.across, size.own))
    if K <= 128:
        return dq, *_key_gradients(p, rows, ("dk", "dv"))
    # Sums of 64 x 256 take half of the registers that a thread can address: one at a time.
    return dq, *_key_gradients(p, rows, ("dk",)), *_key_gradients(p, rows, ("dv",))


def _gradient_inputs(p: Problem, rows: tuple[jax.Array, ...]) -> dict[str, jax.Array]:
    do_BSHK, lse_BHS, delta_BHS = rows
    # lse = +inf makes every weight of an empty row exp2(-inf) = 0, and of a row that pads a tile.
    lse = p.numbers(jnp.where(lse_BHS == -jnp.inf, jnp.inf, lse_BHS * LOG2E), jnp.inf)
    return p.inputs | dict(do=p.flat(p.q_tiles, do_BSHK), lse=lse, delta=p.numbers(delta_BHS, 0.0))


def _query_gradient(p: Problem, rows: tuple[jax.Array, ...]) -> jax.Array:
    size = sizes("dq", p.K)
    inputs = _gradient_inputs(p, rows) | dict(ranges=p.pairs.over_keys().packed())

    def kernel(refs, program):
        at = _Queries(p, refs, program)

        def compute(w):
            plgpu.barrier_wait(refs.own_filled)
            lse, delta = (load(ref.at[at.numbers(w)], 0) for ref in (refs.lse, refs.delta))

            def step(t, dq):
                k, s = at.visit(w, refs.q_own.at[w], t)
                shape = s.value.shape
                weights = jnp.exp2(s.value * s.factor - along(lse, 0, shape))
                bent = weights if s.bend is None else weights * s.bend
                (v,) = at.values.receive(t)
                ds = bent * (product(refs.do_own.at[w], v.transpose((1, 0))) - along(delta, 0, shape))
                at.values.release(t)
                dq = add_product(dq, ds.astype(p.dtype), k)
                at.keys.release(t)
                return dq

            dq = lax.fori_loop(jnp.int32(0), at.walk.total, step, constant(0.0, (ROWS, p.K)))
            refs.dq.at[at.rows(w)][...] = dq * p.spec.scale

        return lambda: at.copy(dict(q="q_own", do="do_own"), size.computing), compute

    dq = jax.ShapeDtypeStruct(inputs["q"].shape, jnp.float32)
    launched = _query_kernel(p, "dq", own=("q", "do"))
    found = launch(kernel, "lcx_attention_dq", inputs=inputs, outputs=dict(dq=dq), **launched)
    return p.unflat(p.q_tiles, found["dq"])


def _key_gradients(p: Problem, rows: tuple[jax.Array, ...], wanted: tuple[str, ...]) -> tuple[jax.Array, ...]:
    """Every key tile against the queries of all heads that share it, one after another: no two programs add to one sum.

    Scores stand with keys along dim 0, so that their products with queries and with do have the sums' rows.
    """
    computing, across = sizes("dkv", p.K)
    members = p.H // p.G
    inputs = _gradient_inputs(p, rows) | dict(ranges=p.pairs.over_queries().packed())
    needed = ("k", "v") if "dk" in wanted else ("k",)

    def kernel(refs, program):
        b, g, tile = place(program, p.G, p.k_tiles.count)
        over = _walk(refs.ranges, b, tile, refs.starts_q, p.q_tiles)
        total = over.total * members
        queries, cotangents = Ring(refs, "q", "lse"), Ring(refs, "do", "delta")
        mine = lambda w: tokens_of(p.k_tiles, tile, b, w)

        def locate(t):
            step = lax.div(t, jnp.int32(members))
            return g * members + t - step * members, *over.locate(step)

        def copy():
            for name in needed:
                for w in range(computing):
                    target = getattr(refs, f"{name}_own").at[w]
                    plgpu.copy_gmem_to_smem(getattr(refs, name).at[mine(w), g], target, refs.own_filled)

            def sources(matrix, numbers):
                def of(t):
                    h, q_tile, _, _ = locate(t)
                    return [matrix.at[tokens_of(p.q_tiles, q_tile, b), h], numbers.at[b, h, tokens_of(p.q_tiles, q_tile)]]

                return of

            stream(total, [(queries, sources(refs.q, refs.lse)), (cotangents, sources(refs.do, refs.delta))])

        def compute(w):
            plgpu.barrier_wait(refs.own_filled)
            first_k = first_order(refs.starts_k, p.k_tiles, tile) + w * (ROWS * p.steps[1])

            def step(t, sums):
                h, q_tile, first_q, full = locate(t)
                pair = p.pair(refs, h, first_q, first_k, full, tokens_of(p.q_tiles, q_tile, b), mine(w))
                q, lse = queries.receive(t)
                s = p.scores(product(refs.k_own.at[w], q.transpose((1, 0))), pair, q_dim=1)
                shape = s.value.shape
                weights = jnp.exp2(s.value * s.factor - along(load(lse, 1), 1, shape))
                bent = weights if s.bend is None else weights * s.bend
                do, delta = cotangents.receive(t)
                if "dv" in wanted:
                    sums = sums | dict(dv=add_product(sums["dv"], weights.astype(p.dtype), do))
                if "dk" in wanted:
                    ds = bent * (product(refs.v_own.at[w], do.transpose((1, 0))) - along(load(delta, 1), 1, shape))
                cotangents.release(t)
                if "dk" in wanted:
                    sums = sums | dict(dk=add_product(sums["dk"], ds.astype(p.dtype), q))
                queries.release(t)
                return sums

            start = {name: constant(0.0, (ROWS, p.K)) for name in wanted}
            sums = lax.fori_loop(jnp.int32(0), total, step, start)
            for name in wanted:
                scale = p.spec.scale if name == "dk" else 1.0
                getattr(refs, name).at[mine(w), g][...] = sums[name] * scale

        return copy, compute

    scratch = {f"{name}_own": matrices(computing, ROWS, p.K, p.dtype) for name in needed}
    scratch |= dict(own_filled=plgpu.Barrier(num_arrivals=len(needed) * computing))
    for matrix, numbers in (("q", "lse"), ("do", "delta")):
        slots = {matrix: matrices(STAGES, across, p.K, p.dtype), numbers: plgpu.SMEM((STAGES, across), jnp.float32)}
        scratch |= Ring.scratch(computing, **slots)
    found = launch(
        kernel,
        f"lcx_attention_{'_'.join(wanted)}",
        programs=p.B * p.G * p.k_tiles.count,
        computing=computing,
        inputs=inputs,
        outputs={name: jax.ShapeDtypeStruct(inputs["k"].shape, jnp.float32) for name in wanted},
        scratch=scratch,
    )
    return tuple(p.unflat(p.k_tiles, found[name]) for name in wanted)
