"""The backward pass of the selective scan in Triton: chunks of a segment from last to first, with their states computed again.

With g = dL/dh_t, a_t = exp(dt_t A), x_t = dt_t u_t, and m = g a_t h_{t-1}:

    g += C_t dy_t;  du = dt (g . B) + D dy;  ddt = u (g . B) + m . A;  dA += m dt;  dB = g . x;  dC = h . dy;  g *= a_t

A chunk is gone through forward once, and the state in front of every GROUP tokens is put into memory of the program's own, which
stays in the cache. Then, from the last group to the first, its states are computed once more and kept in registers with their
decays, and its tokens are gone through in reverse. What belongs to a token and a channel but to no state (softplus, gates, their
derivatives) is computed for ROWS tokens at a time: `selective_scan_triton_tile`.
"""

import triton
import triton.language as tl

from pallas_kernels.selective_scan_triton_tile import (
    DECAYING,
    DY,
    GB,
    MA,
    SLOTS,
    X,
    Y,
    add_sum,
    add_to,
    advanced,
    pair,
    put_pair,
    put_sum,
    rows_after,
    rows_before,
)
from pallas_kernels.selective_scan_triton_token import behind, loaded, shifted


@triton.jit
def _group(
    sums,
    A,
    memory,
    maps,
    SIZE: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    TOGETHER: tl.constexpr,
    GATED: tl.constexpr,
):
    """(g, g, dA, dA) of the two halves in front of GROUP tokens, from those behind them."""
    HALF: tl.constexpr = BLOCK // 2
    g_0, g_1, dA_0, dA_1 = sums
    now, inner, own = memory
    B, C, dB, dC, again = maps
    h = pair(inner + own, HALF)
    before, decays = (), ()
    for j in tl.static_range(GROUP):
        before = before + h
        dt_0, dt_1 = pair(now + DECAYING * SIZE + j * BLOCK, HALF)
        x_0, x_1 = pair(now + X * SIZE + j * BLOCK, HALF)
        a, h = advanced(h, A, (dt_0, dt_1, x_0, x_1), tl.load(B + j * N))
        decays = decays + a
        dy_0, dy_1 = pair(now + DY * SIZE + j * BLOCK, HALF)
        add_sum(dC + j * N, h[0] * dy_0[None, :] + h[1] * dy_1[None, :], again, TOGETHER)
        if GATED:
            C_now = tl.load(C + j * N)[:, None]
            put_sum(now + Y * SIZE + j * BLOCK, (h[0] * C_now, h[1] * C_now), own, HALF)
    for j in tl.static_range(GROUP - 1, -1, -1):
        dt_0, dt_1 = pair(now + DECAYING * SIZE + j * BLOCK, HALF)
        x_0, x_1 = pair(now + X * SIZE + j * BLOCK, HALF)
        dy_0, dy_1 = pair(now + DY * SIZE + j * BLOCK, HALF)
        B_now, C_now = tl.load(B + j * N)[:, None], tl.load(C + j * N)[:, None]
        g_0 += C_now * dy_0[None, :]
        g_1 += C_now * dy_1[None, :]
        put_sum(now + GB * SIZE + j * BLOCK, (g_0 * B_now, g_1 * B_now), own, HALF)
        add_sum(dB + j * N, g_0 * x_0[None, :] + g_1 * x_1[None, :], again, TOGETHER)
        g_0 *= decays[2 * j]
        g_1 *= decays[2 * j + 1]
        m_0, m_1 = g_0 * before[2 * j], g_1 * before[2 * j + 1]
        put_sum(now + MA * SIZE + j * BLOCK, (m_0 * A[0], m_1 * A[1]), own, HALF)
        dA_0 += m_0 * dt_0[None, :]
        dA_1 += m_1 * dt_1[None, :]
    return g_0, g_1, dA_0, dA_1


@triton.jit
def backward_kernel(
    u,
    dt,
    B,
    C,
    z,
    dy,
    rate,
    slowest,
    D,
    bias,
    codes,
    starts,
    dfinal,
    elapsed,
    stretch,
    du,
    ddt,
    dz,
    dB,
    dC,
    dA,
    dD,
    dbias,
    dstate,
    rows,
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
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    SOFTPLUS: tl.constexpr,
):
    group, segment, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    program = (b * SEGMENTS + segment) * tl.num_programs(0) + group
    HALF: tl.constexpr = BLOCK // 2
    n, half, lane, t = tl.arange(0, N), tl.max_contiguous(tl.arange(0, HALF), 2), tl.arange(0, BLOCK), tl.arange(0, ROWS)
    SIZE: tl.constexpr = ROWS * BLOCK
    STATE: tl.constexpr = N * E_PADDED
    own = tl.max_contiguous(n[:, None] * BLOCK + half[None, :], (1, 2))  # a state in the program's memory
    tile = t[:, None] * BLOCK + lane[None, :]  # channels of tokens there
    rows, inner = rows + program * (SLOTS * SIZE), inner + program * (CHUNK // GROUP * N * BLOCK)
    mine = b * SEGMENTS + segment
    blocks = tl.minimum(BLOCKS - group * TOGETHER, TOGETHER)
    dA, dstate = dA + mine * STATE, dstate + mine * STATE
    dD, dbias = dD + mine * E_PADDED, shifted(dbias, mine * E_PADDED)
    dB, dC = dB + group.to(tl.int64) * PARTS, dC + group.to(tl.int64) * PARTS
    for k in range(0, blocks * 2):
        d = (group * TOGETHER * 2 + k) * HALF + half
        entry = tl.max_contiguous(n[:, None] * E_PADDED + d[None, :], (1, 2))
        g = tl.load(dfinal + b * STATE + entry)
        if stretch is not None:
            A, slow, later = tl.load(rate + entry), tl.load(slowest + d), SEGMENTS - 1 - segment
            next_elapsed, next_stretch = elapsed + (mine + 1) * E_PADDED, stretch + (mine + 1) * STATE
            g = behind(g, A, slow, next_elapsed, next_stretch, entry, d, d < E, 1, later, STATE, E_PADDED)
        tl.store(dstate + entry, g)
        tl.store(dA + entry, tl.zeros((N, HALF), tl.float32))
        tl.store(dD + d, tl.zeros((HALF,), tl.float32))
        if bias is not None:
            tl.store(dbias + d, tl.zeros((HALF,), tl.float32))
    tl.debug_barrier()
    tokens = tl.minimum(S - segment * SEGMENT, SEGMENT)
    chunks = (tokens + CHUNK - 1) // CHUNK
    for i in range(0, chunks * blocks):
        chunk, k = chunks - 1 - i // blocks, i % blocks
        block = group * TOGETHER + k
        d = block * BLOCK + lane
        entry = tl.max_contiguous(n[:, None] * E_PADDED + (block * BLOCK + half)[None, :], (1, 2))
        again = n * 0 + k > 0  # parts of dB and dC stand there, of the blocks before
        A = pair(rate + entry, HALF)
        place = segment * (SEGMENT // CHUNK) + chunk  # of the chunk in its row
        left = tokens - chunk * CHUNK  # tokens, those of later chunks too
        parts = (tl.minimum(left, CHUNK) + ROWS - 1) // ROWS
        by_map = (b * CHUNKS + place) * CHUNK  # rows of B and C are whole chunks
        first = b * S + place * CHUNK
        by_token = tl.max_contiguous(t[:, None] * E + d[None, :], (1, 4))

        h = pair(starts + (b * CHUNKS + place) * STATE + entry, HALF)
        for part in range(0, parts):
            mask = (t < left - part * ROWS)[:, None] & (d < E)[None, :]
            here = (first + part * ROWS) * E
            codes_at = shifted(codes, by_map + part * ROWS + t)
            given = u + here + by_token, dt + here + by_token, None, None
            rows_before(given, codes_at, loaded(shifted(bias, d)), rows, mask, tile, SIZE, SOFTPLUS)
            tl.debug_barrier()
            for q in range(0, ROWS // GROUP):
                put_pair(inner + (part * (ROWS // GROUP) + q) * (N * BLOCK) + own, h, HALF)
                now, map_now = rows + q * (GROUP * BLOCK) + half, B + (by_map + part * ROWS + q * GROUP) * N + n
                for j in tl.static_range(GROUP):
                    dt_0, dt_1 = pair(now + DECAYING * SIZE + j * BLOCK, HALF)
                    x_0, x_1 = pair(now + X * SIZE + j * BLOCK, HALF)
                    a, h = advanced(h, A, (dt_0, dt_1, x_0, x_1), tl.load(map_now + j * N))
            tl.debug_barrier()

        g_0, g_1 = pair(dstate + entry, HALF)
        sums = g_0, g_1, tl.zeros((N, HALF), tl.float32), tl.zeros((N, HALF), tl.float32)
        for undone in range(0, parts):
            part = parts - 1 - undone
            mask = (t < left - part * ROWS)[:, None] & (d < E)[None, :]
            here = (first + part * ROWS) * E
            codes_at = shifted(codes, by_map + part * ROWS + t)
            tokens_at = here + by_token
            given = u + tokens_at, dt + tokens_at, shifted(z, tokens_at), dy + tokens_at
            rows_before(given, codes_at, loaded(shifted(bias, d)), rows, mask, tile, SIZE, SOFTPLUS)
            tl.debug_barrier()
            for turn in range(0, ROWS // GROUP):
                q = ROWS // GROUP - 1 - turn
                maps_at = (by_map + part * ROWS + q * GROUP) * N + n
                memory = rows + q * (GROUP * BLOCK) + half, inner + (part * (ROWS // GROUP) + q) * (N * BLOCK), own
                maps = B + maps_at, C + maps_at, dB + maps_at, dC + maps_at, again
                sums = _group(sums, A, memory, maps, SIZE, N, BLOCK, GROUP, TOGETHER, dz is not None)
            tl.debug_barrier()
            found = du + tokens_at, ddt + tokens_at, shifted(dz, tokens_at)
            rows_after(u + tokens_at, tl.load(D + d), rows, found, (dD + d, shifted(dbias, d)), mask, tile, SIZE)
            tl.debug_barrier()
        put_pair(dstate + entry, (sums[0], sums[1]), HALF)
        # Summed over the chunk first: fewer roundings than one long sum has.
        add_to(dA + entry, sums[2])
        add_to(dA + HALF + entry, sums[3])
