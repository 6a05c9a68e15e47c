"""The backward pass of the selective scan for TPU: from the last chunk to the first, with its states computed again.

With g = dL/dh_t, a_t = exp(dt_t A), x_t = dt_t u_t, and m = g a_t h_{t-1}:

    g += C_t dy_t;  du = dt (g . B) + D dy;  ddt = u (g . B) + m . A;  dA += m dt;  dB = g . x;  dC = h . dy;  g *= a_t

A chunk's states are computed from the one in front of it and kept in the chip; its tokens are then gone through in reverse, a
slab of 8 at a time and in it one state after another, so that gradient and rate of the state stay in two registers. dB and dC
are sums over all channels: those over the 8 groups of a tile are taken as 8 loads with a stride, which put 8 tokens along
sublanes; those over tiles are added up in memory; those over lanes are taken once a chunk, by a transposition. Every sum has one
order.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import selective_scan_tpu_layout as layout
from pallas_kernels.selective_scan_tpu_cut import GROUPS, LANES, SLAB, STRIDE, Cut, kept_decays
from pallas_kernels.selective_scan_tpu_layout import everywhere, lanes_of, of_tile, only, rows, step_size, token

# Tokens of a slab, last to first. What belongs to a token stays in registers: that of 4 tokens fits, that of 8 does not.
HALVES = ((7, 6, 5, 4), (3, 2, 1, 0))


def kernel(refs, *, cut: Cut, spec):
    """All gradients of one chunk of one tile of channels."""
    chunk, k, tiles = pl.program_id(2), pl.program_id(3), pl.num_programs(3)
    tile = of_tile(k)

    @pl.when(chunk == 0)
    def begin():
        refs.dstate[:, tile, :] = refs.dfinal[:, tile, :]
        refs.dA[:, tile, :] = jnp.zeros((cut.N, GROUPS, LANES), jnp.float32)
        for sums in [refs.dD] if refs.bias is None else [refs.dD, refs.dbias]:
            sums[k] = jnp.zeros(sums.shape[1:], jnp.float32)

    @pl.when((chunk == 0) & (k == 0))
    def begin_sums():
        for sums in (refs.sum_B, refs.sum_C):
            sums[...] = jnp.zeros(sums.shape, jnp.float32)

    layout.prepare(refs, cut, k, spec.dt_softplus)
    refs.chunk_dA[...] = jnp.zeros(refs.chunk_dA.shape, jnp.float32)
    _states_again(refs, cut, tile)
    lax.fori_loop(0, cut.chunk // 8, lambda i, _: _slab(refs, cut, tile, cut.chunk // 8 - 1 - i), None)
    refs.dA[:, tile, :] += refs.chunk_dA[...]  # summed over the chunk first: fewer roundings than one long sum has
    _by_rows(refs, cut, spec, k)

    @pl.when(k == tiles - 1)
    def finish():
        lax.fori_loop(0, cut.chunk // 8 // cut.slabs, lambda i, _: _over_lanes(refs, cut, i), None)


def _states_again(refs, cut: Cut, tile) -> None:
    """The chunk's states into memory; what is read from them, where the gradient of the gate needs it."""
    for n in range(cut.N):
        refs.history[0, n] = refs.starts[n]

    def forward(q, t, h):
        dt, x, y = step_size(refs, q, t), refs.spread_x[token(q, t), :], None
        for n in range(cut.N):
            row = (q * cut.N + n) * 8 + t
            decay = jnp.exp2(dt * refs.A[n, tile, :])
            if n < kept_decays(cut.N):
                refs.decays[q * 8 + t, n] = decay
            h[n] = decay * h[n] + x * everywhere(refs.across_B, row)
            refs.history[q * 8 + t + 1, n] = h[n]
            if refs.spread_y is not None:
                added = h[n] * everywhere(refs.across_C, row)
                y = added if y is None else y + added
        if refs.spread_y is not None:
            refs.spread_y[token(q, t), :] = y

    layout.over_tokens(cut, forward, tuple(refs.starts[n] for n in range(cut.N)))


def _slab(refs, cut: Cut, tile, q) -> None:
    """Slab q in reverse."""
    gB, mA = [None] * 8, [None] * 8
    plus = lambda total, x: x if total is None else total + x
    for tokens in HALVES:
        dt, x, dy = ({t: f(t) for t in tokens} for f in _readers(refs, q))
        for n in range(cut.N):
            g, dA = refs.dstate[n, tile, :], refs.chunk_dA[n]
            h = refs.history[q * 8 + tokens[0] + 1, n]
            for t in tokens:
                row = (q * cut.N + n) * 8 + t
                g = g + everywhere(refs.across_C, row) * dy[t]
                gB[t] = plus(gB[t], g * everywhere(refs.across_B, row))
                refs.products[pl.ds(n * SLAB + t * STRIDE, GROUPS), :] = g * x[t]
                refs.products[pl.ds((cut.N + n) * SLAB + t * STRIDE, GROUPS), :] = h * dy[t]
                g = g * (refs.decays[q * 8 + t, n] if n < kept_decays(cut.N) else jnp.exp2(dt[t] * refs.A[n, tile, :]))
                h = refs.history[q * 8 + t, n]
                m = g * h
                mA[t] = plus(mA[t], m * refs.rate[n, tile, :])
                dA = dA + m * dt[t]
            refs.dstate[n, tile, :], refs.chunk_dA[n] = g, dA
            if tokens[-1] == 0:
                _over_groups(refs, cut, q, n)
        for t in tokens:
            refs.spread_gB[token(q, t), :], refs.spread_mA[token(q, t), :] = gB[t], mA[t]


def _over_groups(refs, cut: Cut, q, n: int) -> None:
    """Adds the products of slab q and state n, summed over the groups of channels, tokens along sublanes."""
    for which, sums in enumerate((refs.sum_B, refs.sum_C)):
        first = (which * cut.N + n) * SLAB
        of_groups = [refs.products[pl.ds(first + group, 8, stride=STRIDE), :] for group in range(GROUPS)]
        while len(of_groups) > 1:
            of_groups = [a + b for a, b in zip(of_groups[::2], of_groups[1::2], strict=True)]
        at = pl.ds(pl.multiple_of((q * cut.N + n) * 8, 8), 8)
        sums[at, :] = of_groups[0] if cut.tiles == cut.cores else sums[at, :] + of_groups[0]


def _readers(refs, q):
    return (
        lambda t: step_size(refs, q, t),
        lambda t: refs.spread_x[token(q, t), :],
        lambda t: refs.spread_dy[token(q, t), :],
    )


def _by_rows(refs, cut: Cut, spec, k) -> None:
    """Gradients of what belongs to a token and a channel, and the sums of those that belong to a channel."""

    def of_rows(i, sums):
        real, found = layout.real_rows(refs, i), []
        halves = lambda x: x[:8] + x[8:]
        for j in range(GROUPS):
            lanes, tokens = lanes_of(j), layout.tokens_of(i)
            u, gB, dt = rows(refs.u, i, j), layout.take(refs.spread_gB, i, j), layout.take(refs.spread_dt, i, j)
            dy, D = layout.take(refs.spread_dy, i, j), refs.D[k, :, lanes]
            refs.du[tokens, lanes] = (dt * gB + D * dy).astype(refs.du.dtype)
            ddt = u * gB + layout.take(refs.spread_mA, i, j)
            ddt = only(real, ddt * layout.take(refs.slope_dt, i, j) if spec.dt_softplus else ddt)
            refs.ddt[tokens, lanes] = ddt.astype(refs.ddt.dtype)
            if refs.z is not None:
                y = layout.take(refs.spread_y, i, j) + D * u
                dz = layout.take(refs.slope_z, i, j) * y
                refs.dz[tokens, lanes] = only(real if cut.ragged else None, dz).astype(refs.dz.dtype)
            found.append(halves(only(real if cut.ragged else None, u * dy)))
            if refs.bias is not None:
                found.append(halves(ddt))
        return tuple(a + b for a, b in zip(sums, found, strict=True))

    wanted = [refs.dD] if refs.bias is None else [refs.dD, refs.dbias]
    zero = jnp.zeros((8, LANES), jnp.float32)
    sums = lax.fori_loop(0, cut.chunk // layout.ROWS, of_rows, (zero,) * (GROUPS * len(wanted)))
    for j in range(GROUPS):
        for which, ref in enumerate(wanted):
            ref[k, :, lanes_of(j)] += sums[j * len(wanted) + which]


def _over_lanes(refs, cut: Cut, i) -> None:
    """Totals of some slabs, as `Cut.sums` has them; and zeros for the next chunk."""
    lane = lax.broadcasted_iota(jnp.int32, (8, LANES), 1)
    for sums, found in ((refs.sum_B, refs.dB), (refs.sum_C, refs.dC)):
        rows_of = lambda n, q: pl.ds(pl.multiple_of(((i * cut.slabs + q) * cut.N + n) * 8, 8), 8)
        for first in range(0, cut.N, 16):
            x = jnp.zeros((8, LANES), jnp.float32)
            for n in range(first, min(first + 16, cut.N)):
                for q in range(cut.slabs):
                    total = jnp.sum(sums[rows_of(n, q), :], axis=1, keepdims=True)
                    x = jnp.where(lane == (n - first) * 8 + q, total, x)
            found[i, first // 16] = x
        if cut.tiles > cut.cores:
            size = cut.slabs * cut.N * 8
            sums[pl.ds(pl.multiple_of(i * size, size), size), :] = jnp.zeros((size, LANES), jnp.float32)


def stretch_kernel(refs, *, cut: Cut, spec):
    """The state that a stretch of tokens makes of zero; in reverse, the gradient in front of it from one of zero behind it."""
    chunk, k = pl.program_id(2), pl.program_id(3)
    tile = of_tile(k)

    @pl.when(chunk == 0)
    def begin():
        refs.state[:, tile, :] = jnp.zeros((cut.N, GROUPS, LANES), jnp.float32)

    layout.prepare(refs, cut, k, spec.dt_softplus)

    def pass_on(q, t, s):
        dt = step_size(refs, q, t)
        added, across = (refs.spread_dy, refs.across_C) if cut.reverse else (refs.spread_x, refs.across_B)
        added = added[token(q, t), :]
        for n in range(cut.N):
            decay = jnp.exp2(dt * refs.A[n, tile, :])
            new = added * everywhere(across, (q * cut.N + n) * 8 + t)
            s[n] = decay * (s[n] + new) if cut.reverse else decay * s[n] + new

    s = layout.over_tokens(cut, pass_on, tuple(refs.state[n, tile, :] for n in range(cut.N)), cut.reverse)
    for n in range(cut.N):
        refs.state[n, tile, :] = s[n]
