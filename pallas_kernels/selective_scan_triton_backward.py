"""The backward pass of the selective scan on GPUs: chunks of a segment from last to first, with their states computed again.

With g = dL/dh_t, a_t = exp(dt_t A), x_t = dt_t u_t, and m = g a_t h_{t-1}:

    g += C_t dy_t;  du = dt (g . B) + D dy;  ddt = u (g . B) + m . A;  dA += m dt;  dB = g . x;  dC = h . dy;  g *= a_t

A chunk is gone through forward once, and the state in front of every GROUP tokens is put into memory of the program's own, which
stays in the cache. Then, from the last group to the first, its states are computed once more and kept in registers with their
decays, and its tokens are gone through in reverse. A program is a warp; `selective_scan_triton_tile` says who has which numbers.
"""

import triton.language as tl

from pallas_kernels.selective_scan_triton_rows import put_rows, put_rows_of_states
from pallas_kernels.selective_scan_triton_tile import (
    channel_parts_memory,
    channel_sums,
    every_fourth,
    maps_layout,
    of_channels,
    of_states,
    put_channel_parts,
    put_state_parts,
    put_tile,
    row_memory,
    stacked_memory,
    state_parts_layout,
    state_parts_memory,
    tile_at,
    tile_layout,
)
from pallas_kernels.selective_scan_triton_token import LN2, behind, shifted
from pallas_kernels.triton_shared import gl, jit


@jit
def _add_to(at, x):
    tl.store(at, x + tl.load(at))


@jit
def _advanced(h, A, rows, maps, FIRST: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr):
    """The state behind a group of tokens; dt, x and B are FIRST groups down in memory, dt and x one behind the other."""
    for j in tl.static_range(GROUP):
        dt, x = of_channels(rows, 2 * FIRST * GROUP + j, TILE), of_channels(rows, (2 * FIRST + 1) * GROUP + j, TILE)
        h = tl.exp2(A * dt) * h + of_states(maps, FIRST * GROUP + j, TILE) * x
    return h


@jit
def _states_again(
    h, A, rows, maps, by_states, by_channels, GATED: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr
):
    """(a_t h_{t-1}, a_t) of the tokens of a group; puts the parts of h . dy, and of h . C for the gate, into shared memory."""
    TILE: tl.constexpr = tile_layout(N, BLOCK)
    arrived, decays = (), ()
    for j in tl.static_range(GROUP):
        a = tl.exp2(A * of_channels(rows, j, TILE))
        here = a * h
        h = here + of_states(maps, j, TILE) * of_channels(rows, GROUP + j, TILE)
        arrived, decays = arrived + (here,), decays + (a,)
        put_channel_parts(by_channels, GROUP + j, h * of_channels(rows, 2 * GROUP + j, TILE), N, BLOCK)
        if GATED:
            put_state_parts(by_states, j, h * of_states(maps, GROUP + j, TILE), N, BLOCK)
    return arrived, decays


@jit
def _reversed(g, dA, A, states, rows, maps, by_states, by_channels, N: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """(g, dA) in front of a group; puts the parts of g . B, m . A and g . x into shared memory."""
    TILE: tl.constexpr = tile_layout(N, BLOCK)
    arrived, decays = states
    gBs, mAs = by_states
    for j in tl.static_range(GROUP - 1, -1, -1):
        g += of_states(maps, GROUP + j, TILE) * of_channels(rows, 2 * GROUP + j, TILE)
        put_state_parts(gBs, j, g * of_states(maps, j, TILE), N, BLOCK)
        put_channel_parts(by_channels, j, g * of_channels(rows, GROUP + j, TILE), N, BLOCK)
        m = g * arrived[j]
        g *= decays[j]
        put_state_parts(mAs, j, m * A, N, BLOCK)
        dA += m * of_channels(rows, j, TILE)
    return g, dA


@jit
def backward_kernel(
    u,
    dt,
    maps,
    z,
    dy,
    rate,
    slowest,
    channels,
    codes,
    starts,
    dfinal,
    elapsed,
    stretch,
    du,
    ddt,
    dz,
    dmaps,
    dstates,
    dchannels,
    inner,
    S: tl.constexpr,
    E: tl.constexpr,
    E_PADDED: tl.constexpr,
    N: tl.constexpr,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    TOGETHER: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    SOFTPLUS: tl.constexpr,
):
    """`maps`: B, then C of every group; `channels`: D, then the bias;
    and of their gradients alike; `dstates`: the state's, then dA."""
    TILE: tl.constexpr = tile_layout(N, BLOCK)
    STATE_PARTS: tl.constexpr = state_parts_layout(N, BLOCK)
    ROWS: tl.constexpr = gl.SliceLayout(1, STATE_PARTS)
    MAPS: tl.constexpr = maps_layout(N)
    STATE: tl.constexpr = N * E_PADDED
    group, segment, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    program = (b * SEGMENTS + segment) * tl.num_programs(0) + group
    mine = b * SEGMENTS + segment
    n = gl.arange(0, N, gl.SliceLayout(0, gl.SliceLayout(2, TILE)))[None, :, None]
    lane = gl.arange(0, BLOCK, gl.SliceLayout(0, gl.SliceLayout(1, TILE)))[None, None, :]
    t, channel = gl.arange(0, GROUP, gl.SliceLayout(1, ROWS)), gl.arange(0, BLOCK, gl.SliceLayout(0, ROWS))
    state = gl.arange(0, N, gl.SliceLayout(0, MAPS))[None, :]
    map_at = gl.arange(0, GROUP, gl.SliceLayout(1, MAPS))[:, None] * N + state
    both_at = gl.arange(0, 2 * GROUP, gl.SliceLayout(1, MAPS))[:, None] * N + state
    inner += program * (CHUNK // GROUP * N * BLOCK) + every_fourth(n * BLOCK + lane, N, BLOCK)
    dstates, dchannels = dstates + mine * (2 * STATE), dchannels + mine * (2 * E_PADDED)
    dmaps += group.to(tl.int64) * PARTS

    kept = stacked_memory(CHUNK // GROUP, GROUP, BLOCK)
    rows, both, sums = row_memory(4 * GROUP, BLOCK), row_memory(2 * GROUP, N), row_memory(2 * GROUP, BLOCK)
    gBs, others = state_parts_memory(GROUP, N, BLOCK), state_parts_memory(GROUP, N, BLOCK)
    by_channels = channel_parts_memory(2 * GROUP, N, BLOCK)
    sums_D, sums_bias = sums.slice(0, GROUP, 0), sums.slice(GROUP, GROUP, 0)

    blocks = tl.minimum(BLOCKS - group * TOGETHER, TOGETHER)
    for k in range(0, blocks):
        first = (group * TOGETHER + k) * BLOCK
        d = first + lane
        entry = n * E_PADDED + d
        g = tl.load(dfinal + b * STATE + entry)
        if stretch is not None:
            A, slow, later = tl.load(rate + entry), tl.load(slowest + d), SEGMENTS - 1 - segment
            next_elapsed, next_stretch = elapsed + (mine + 1) * E_PADDED, stretch + (mine + 1) * STATE
            g = behind(g, A, slow, next_elapsed, next_stretch, entry, d, d < E, 1, later, STATE, E_PADDED)
        tl.store(dstates + entry, g)
        tl.store(dstates + STATE + entry, tl.where(d < 0, g, 0.0))  # 0, whatever g is
        tl.store(dchannels + first + channel, channel * 0.0)
        tl.store(dchannels + E_PADDED + first + channel, channel * 0.0)

    entry = every_fourth(n * E_PADDED + lane, N, BLOCK)
    tokens = tl.minimum(S - segment * SEGMENT, SEGMENT)
    chunks = (tokens + CHUNK - 1) // CHUNK
    chunk, k = chunks - 1, 0
    while chunk >= 0:
        block = group * TOGETHER + k
        d = block * BLOCK + channel
        at, within = t[:, None] * E + d[None, :], (d < E)[None, :]
        place = segment * (SEGMENT // CHUNK) + chunk  # of the chunk in its row
        left = tl.minimum(tokens - chunk * CHUNK, CHUNK)
        pairs = (left + 2 * GROUP - 1) // (2 * GROUP)  # of groups
        by_map = (b * CHUNKS + place) * CHUNK  # rows of B and C are whole chunks
        first = (b * S + place * CHUNK) * E
        A = tile_at(rate + block * BLOCK + entry, E_PADDED, N, BLOCK)
        h = tile_at(starts + (b * CHUNKS + place) * STATE + block * BLOCK + entry, E_PADDED, N, BLOCK)
        D, bias = channels + d, channels + E_PADDED + d
        for pair in range(0, pairs):
            for half in tl.static_range(2):
                q = pair * 2 + half
                here, token = first + q * (GROUP * E), by_map + q * GROUP
                given = u + here, dt + here, shifted(codes, token), bias
                dts, xs = rows.slice(2 * half * GROUP, GROUP, 0), rows.slice((2 * half + 1) * GROUP, GROUP, 0)
                put_rows_of_states(given, t, within, left - q * GROUP, kept.index(q), dts, xs, at, SOFTPLUS)
                both.slice(half * GROUP, GROUP, 0).store(tl.load(maps + token * (2 * N) + map_at))
            put_tile(inner + pair * (2 * N * BLOCK), h, BLOCK, N, BLOCK)
            h = _advanced(h, A, rows, both, 0, GROUP, TILE)
            put_tile(inner + pair * (2 * N * BLOCK) + N * BLOCK, h, BLOCK, N, BLOCK)
            if pair < pairs - 1:
                h = _advanced(h, A, rows, both, 1, GROUP, TILE)

        state_at = dstates + block * BLOCK + entry
        g = tile_at(state_at, E_PADDED, N, BLOCK)
        chunk_dA = A * 0.0
        sums_D.store(at * 0.0)
        sums_bias.store(at * 0.0)
        q = (left + GROUP - 1) // GROUP
        while q > 0:
            q -= 1
            here, token = first + q * (GROUP * E), by_map + q * GROUP
            given = u + here, dt + here, shifted(z, here), dy + here, shifted(codes, token), bias
            value, of_gate = put_rows(given, t, within, left - q * GROUP, kept.index(q).load(ROWS), rows, at, GROUP, SOFTPLUS)
            both.store(tl.load(maps + token * (2 * N) + both_at))
            h = tile_at(inner + q * (N * BLOCK), BLOCK, N, BLOCK)
            inside = (t < left - q * GROUP)[:, None] & within
            states = _states_again(h, A, rows, both, others, by_channels, z is not None, N, BLOCK, GROUP)
            if z is not None:
                of_gate *= tl.sum(others.load(STATE_PARTS), axis=1) + tl.load(D)[None, :] * value
                tl.store(dz + here + at, of_gate.to(dz.dtype.element_ty), mask=inside)
            g, chunk_dA = _reversed(g, chunk_dA, A, states, rows, both, (gBs, others), by_channels, N, BLOCK, GROUP)
            dmap, dmaps_at = channel_sums(by_channels, 2 * GROUP, N, BLOCK), dmaps + token * (2 * N) + both_at
            if TOGETHER > 1:
                if k > 0:  # those of the blocks before stand there
                    dmap += tl.load(dmaps_at)
            tl.store(dmaps_at, dmap)
            inner_g = tl.sum(gBs.load(STATE_PARTS), axis=1)
            of_step = value * inner_g + tl.sum(others.load(STATE_PARTS), axis=1) * LN2
            of_step *= rows.slice(3 * GROUP, GROUP, 0).load(ROWS)
            tl.store(ddt + here + at, of_step.to(ddt.dtype.element_ty), mask=inside)
            sums_bias.store(sums_bias.load(ROWS) + of_step)
            gradient = rows.slice(2 * GROUP, GROUP, 0).load(ROWS)
            sums_D.store(sums_D.load(ROWS) + gradient * value)
            of_u = kept.index(q).load(ROWS) * inner_g + tl.load(D)[None, :] * gradient
            tl.store(du + here + at, of_u.to(du.dtype.element_ty), mask=inside)
        put_tile(state_at, g, E_PADDED, N, BLOCK)
        # Summed over the chunk first: fewer roundings than one long sum has.
        put_tile(state_at + STATE, chunk_dA + tile_at(state_at + STATE, E_PADDED, N, BLOCK), E_PADDED, N, BLOCK)
        _add_to(dchannels + d, tl.sum(sums_D.load(ROWS), axis=0))
        _add_to(dchannels + E_PADDED + d, tl.sum(sums_bias.load(ROWS), axis=0))
        k += 1
        if k == blocks:
            chunk, k = chunk - 1, 0
