"""The backward pass of state-space duality for TPU: from the last chunk to the first, states inside a block computed again.

With P_ij = exp(s_i - s_j) for j <= i of one document, f_i = exp(s_i), e_j = exp(s_C - s_j), and g the gradient of the state
behind the chunk; sums over the heads of a group are written sum_h:

    u_j   = sum_i (C_i . B_j) P_ij dy_i + e_j g B_j;         dx_j = dt_j u_j + D dy_j
    dW_ij = sum_h P_ij dt_j (x_j . dy_i)
    dC_i  = sum_j dW_ij B_j + sum_h f_i h dy_i;              dB_j = sum_i dW_ij C_i + sum_h e_j dt_j g x_j
    da_k  = sum_{j<k<=i} Q_ij + sum_{i>=k} f_i dy_i . h C_i + sum_{j<k} e_j dt_j x_j . g B_j + exp(s_C) g . h
    ddt_k = x_k . u_k + A da_k;                              dA = sum_k dt_k da_k
    dh    = exp(s_C) g + sum_i f_i dy_i (x) C_i;             Q_ij = (C_i . B_j) P_ij dt_j (x_j . dy_i)

The sum of Q over pairs around k is a sum from k on of (sum_{j<i} Q_ij - sum_{i'>i} Q_i'i): pairs of a token with itself, which
would have to cancel, are not in it. Pairs stand turned, (j, i), so that u and dB need no transpose. Everything that is added up
over heads or chunks has one order.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.mosaic_tpu import dot, to_sublanes
from pallas_kernels.ssd_tpu_chunk import (
    Chunk,
    before,
    codes,
    fill_rows,
    lanes_of,
    over_tiles,
    prefix_sums,
    rates,
    step_sizes,
    turn,
)
from pallas_kernels.ssd_tpu_cut import Cut

# Rows that are made tile after tile, and read for all heads behind them: x . u; what is summed from a token on; what is summed
# up to a token; what belongs to all tokens.
ROWS = ("direct", "from", "until", "through")


def kernel(refs, *, cut: Cut, spec):
    """All gradients of one block."""

    @pl.when(pl.program_id(3) == 0)
    def begin():
        refs.dstate[...] = refs.dfinal[...]
        for sums in (refs.dA, refs.dD) if refs.bias is None else (refs.dA, refs.dD, refs.dbias):
            sums[...] = jnp.zeros(sums.shape, jnp.float32)

    refs.states[0] = refs.starts[...]
    fill_rows(refs, cut, spec)

    def forward(c, _):
        part = Chunk(refs, cut, c)
        refs.turned_B[...] = turn(part.load(refs.B))

        def write(lanes, state):
            refs.states[c + 1, :, lanes] = state

        part.steps(lambda lanes: refs.states[c, :, lanes], write)

    lax.fori_loop(0, cut.chunks - 1, forward, None)
    lax.fori_loop(0, cut.chunks, lambda i, _: _chunk(refs, cut, cut.chunks - 1 - i), None)
    _step_sizes(refs, cut, spec)


def _chunk(refs, cut: Cut, c) -> None:
    part = Chunk(refs, cut, c)
    B, C = part.load(refs.B), part.load(refs.C)
    refs.kept_B[...], refs.kept_C[...], refs.turned_C[...] = B, C, turn(C)
    seen, products = part.visible(turned=True), dot(B, C, 1, 1)
    j, i = (lax.broadcasted_iota(jnp.int32, seen.shape, dim) for dim in (0, 1))
    refs.pairs[...] = jnp.where(seen, products, 0.0)
    refs.pairs_apart[...] = jnp.where(seen & (j < i), products, 0.0)
    for sums in (refs.dpairs, refs.sum_B, refs.sum_C):
        sums[...] = jnp.zeros(sums.shape, jnp.float32)
    over_tiles(cut, lambda t: _tile(part, t), lambda t, found: _store(part, t, found), lambda found: _store_sums(part, found))
    dpairs = jnp.where(part.visible(turned=True), refs.dpairs[...], 0.0).astype(cut.kind)
    refs.dB[part.tokens, :] = refs.sum_B[...] + dot(dpairs, refs.kept_C[...], 1, 0)
    refs.dC[part.tokens, :] = refs.sum_C[...] + dot(dpairs, refs.kept_B[...], 0, 0)


class _Found(NamedTuple):
    """What the heads of a tile add.

    Attributes:
      dx, dstate, dD: (tokens, lanes), (N, lanes), (8, lanes).
      dpairs: (tokens j, tokens i), of all its heads.
      dy, state, x, dstate_behind: (tokens or N, lanes), operands of sum_C and of sum_B.
      rows: name -> a row of tokens for each head.
    """

    dx: jax.Array
    dstate: jax.Array
    dD: jax.Array
    dpairs: jax.Array
    dy: jax.Array
    state: jax.Array
    x: jax.Array
    dstate_behind: jax.Array
    rows: dict[str, list[jax.Array]]


def _tile(part: Chunk, t) -> Iterator[_Found | None]:
    """In phases, for `over_tiles`."""
    refs, kind, lanes = part.refs, part.cut.kind, lanes_of(t)
    x, dy = part.load(refs.x, lanes), part.load(refs.dy, lanes)
    h, g = refs.states[part.c, :, lanes], refs.dstate[:, lanes]
    narrow_h, narrow_g = h.astype(kind), g.astype(kind)
    dt, left, ahead = (part.columns(name, t) for name in ("dt", "left", "ahead"))
    wide_x, wide_dy = x.astype(jnp.float32), dy.astype(jnp.float32)
    scaled_x, scaled_dy = dt * wide_x, left * wide_dy
    ahead_x, narrow_dy = ahead * scaled_x, scaled_dy.astype(kind)

    each_x = part.only(scaled_x.astype(kind))
    of_head = lambda which: each_x[which * part.cut.chunk : (which + 1) * part.cut.chunk]
    products = [dot(of_head(which), dy, 1, 1) for which in range(part.cut.per_tile)]
    from_g, from_h = dot(refs.kept_B[...], narrow_g, 1, 0), dot(refs.kept_C[...], narrow_h, 1, 0)
    kept = left[part.cut.chunk - 1 :]
    dstate = kept * g + dot(refs.turned_C[...], narrow_dy, 1, 0)
    yield
    each = [decays(part, head, turned=True) for head in part.heads(t)]
    weights = jnp.concatenate([(refs.pairs[...] * decay).astype(kind) for decay in each], axis=1)
    changes = [decay * product for decay, product in zip(each, products, strict=True)]
    dpairs = functools.reduce(jnp.add, changes)
    yield
    u = dot(weights, part.only(dy), 1, 0) + ahead * from_g
    later = []
    for change in changes:
        over_j, over_i = part.sums_of_pairs(refs.pairs_apart[...] * change)
        later.append(over_j - over_i)
    yield
    through = to_sublanes(kept * jnp.sum(g * h, axis=0, keepdims=True))
    through = [jnp.sum(x, axis=0, keepdims=True) for x in jnp.split(through, part.cut.per_tile)]
    rows = dict(direct=part.sums(wide_x * u), until=part.sums(ahead_x * from_g))
    rows["from"] = [a + b for a, b in zip(later, part.sums(scaled_dy * from_h), strict=True)]
    rows["through"] = [jnp.broadcast_to(x, (1, part.cut.chunk)) for x in through]
    over_tokens = wide_x * wide_dy
    yield _Found(
        dx=dt * u + refs.D[:, lanes] * wide_dy,
        dstate=dstate,
        dD=jnp.sum(over_tokens.reshape(-1, 8, over_tokens.shape[1]), axis=0),
        dpairs=dpairs,
        dy=narrow_dy,
        state=narrow_h,
        x=ahead_x.astype(kind),
        dstate_behind=narrow_g,
        rows=rows,
    )


def _store(part: Chunk, t, found: _Found) -> None:
    refs, lanes = part.refs, lanes_of(t)
    refs.dx[part.tokens, lanes] = found.dx.astype(refs.dx.dtype)
    refs.dstate[:, lanes] = found.dstate
    refs.dD[:, lanes] += found.dD
    for name, of_heads in found.rows.items():
        for head, row in zip(part.heads(t), of_heads, strict=True):
            part.put(name, head, row)


def _store_sums(part: Chunk, found: list[_Found]) -> None:
    """Tiles beside each other are one long contraction."""
    refs = part.refs
    beside = lambda name: jnp.concatenate([getattr(x, name) for x in found], axis=1)
    refs.dpairs[...] += functools.reduce(jnp.add, [x.dpairs for x in found])
    refs.sum_C[...] += dot(beside("dy"), beside("state"), 1, 1)
    refs.sum_B[...] += dot(beside("x"), beside("dstate_behind"), 1, 1)


def _step_sizes(refs, cut: Cut, spec) -> None:
    """Gradients of step sizes and rates, for all heads and chunks."""
    dt, until = refs.row_dt[...], refs.row_until[...]
    da = prefix_sums(refs.row_from[...], reverse=True) + (prefix_sums(until) - until) + refs.row_through[...]
    ddt = (refs.row_direct[...] + rates(refs, cut) * da) * step_sizes(before(refs, cut), spec)[1]
    if refs.codes is not None:
        ddt = jnp.where(codes(refs, cut, 1) > 0, ddt, 0.0)
    by_chunk = lambda x: jnp.split(x, cut.chunks)
    for c, x in enumerate(by_chunk(ddt)):
        refs.ddt[:, c * cut.chunk : (c + 1) * cut.chunk] = x
    refs.dA[...] += functools.reduce(jnp.add, by_chunk(dt * da))
    if refs.bias is not None:
        refs.dbias[...] += functools.reduce(jnp.add, by_chunk(ddt))


def decays(part: Chunk, head, turned: bool) -> jax.Array:
    """exp(s_i - s_j) of a head at (i, j), at (j, i) if `turned`; where j > i something finite."""
    log = None
    for name in ("s",) if part.cut.kind == jnp.bfloat16 else ("whole", "part"):
        difference = part.column(name, head) - part.row(name, head)
        log = difference if log is None else log + difference
    return jnp.exp2(jnp.minimum(-log if turned else log, 0.0))


def stretch_kernel(refs, *, cut: Cut, spec):
    """The state that a stretch of tokens makes of zero; in reverse, the gradient in front of it from one of zero behind it."""

    @pl.when(pl.program_id(3) == 0)
    def begin():
        refs.state[...] = jnp.zeros(refs.state.shape, jnp.float32)

    fill_rows(refs, cut, spec)

    def chunk(i, _):
        part = Chunk(refs, cut, cut.chunks - 1 - i if cut.reverse else i)

        def write(lanes, state):
            refs.state[:, lanes] = state

        def gradient(t):
            lanes, left = lanes_of(t), part.columns("left", t)
            scaled_dy = (left * part.load(refs.dy, lanes).astype(jnp.float32)).astype(cut.kind)
            yield left[cut.chunk - 1 :] * refs.state[:, lanes] + dot(refs.turned_C[...], scaled_dy, 1, 0)

        if cut.reverse:
            refs.turned_C[...] = turn(part.load(refs.C))
            over_tiles(cut, gradient, lambda t, state: write(lanes_of(t), state))
        else:
            refs.turned_B[...] = turn(part.load(refs.B))
            part.steps(lambda lanes: refs.state[:, lanes], write)

    lax.fori_loop(0, cut.chunks, chunk, None)
