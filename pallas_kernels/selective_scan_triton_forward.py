"""The forward pass of the selective scan in Triton: one program goes through a segment of a row, for a block of channels.

The state (N, BLOCK) stays in registers, all N states of a channel in one thread, so that nothing crosses threads. Every program
first puts together what the segments before its own do to the initial state (`selective_scan_triton_stretch`).
"""

import triton
import triton.language as tl

from pallas_kernels.selective_scan_triton_token import (
    REAL,
    behind,
    decaying,
    loaded,
    put_row,
    row,
    shifted,
    sigmoid,
    step_size,
)


@triton.jit
def _token(h, A, D, bias, at, n, inside, RAGGED: tl.constexpr, SOFTPLUS: tl.constexpr):
    """The state after a token, whose output is stored."""
    u, dt, z, y, B, C, codes = at
    code = loaded(codes)
    u_now = row(u, inside, RAGGED)
    step = step_size(row(dt, inside, RAGGED), bias, code, SOFTPLUS)
    x = step * u_now
    h = tl.exp2(A * decaying(step, code)[None, :]) * h + tl.load(B + n)[:, None] * x[None, :]
    out = tl.sum(h * tl.load(C + n)[:, None], axis=0) + D * u_now
    if z is not None:
        gate = row(z, inside, RAGGED)
        out *= gate * sigmoid(gate)
    if code is not None:
        out = tl.where(code < REAL, 0.0, out)
    put_row(y, out, inside, RAGGED)
    return h


@triton.jit
def forward_kernel(
    u,
    dt,
    B,
    C,
    z,
    rate,
    slowest,
    D,
    bias,
    codes,
    initial,
    elapsed,
    stretch,
    y,
    starts,
    state,
    S: tl.constexpr,
    E: tl.constexpr,
    E_PADDED: tl.constexpr,
    N: tl.constexpr,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    UNROLLED: tl.constexpr,
    SOFTPLUS: tl.constexpr,
):
    segment, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    RAGGED: tl.constexpr = E % BLOCK != 0
    n, d = tl.arange(0, N), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = d < E
    # The hint decides how many neighbouring channels a thread holds, and thereby that it holds all states of each.
    entry = tl.max_contiguous(n[:, None] * E_PADDED + d[None, :], (1, NEIGHBOURS))
    d = tl.max_contiguous(d, NEIGHBOURS)
    A, h = tl.load(rate + entry), tl.load(initial + b * (N * E_PADDED) + entry)
    if stretch is not None:
        last = b * SEGMENTS + segment - 1
        elapsed, stretch = elapsed + last * E_PADDED, stretch + last * (N * E_PADDED)
        slow, STATE = tl.load(slowest + d)[None, :], N * E_PADDED
        h = behind(h, A, slow, elapsed, stretch, entry, d[None, :], inside[None, :], -1, segment, STATE, E_PADDED)
    skip, offset = tl.load(D + d), loaded(shifted(bias, d))
    first = segment * SEGMENT
    tokens, token = tl.minimum(S - first, SEGMENT), b * S + first
    u, dt, z, y = u + token * E + d, dt + token * E + d, shifted(z, token * E + d), y + token * E + d
    B, C, codes = B + token * N, C + token * N, shifted(codes, token)
    starts += (b * CHUNKS + first // CHUNK) * (N * E_PADDED)
    for i in range(0, tokens // UNROLLED):
        if i % (CHUNK // UNROLLED) == 0:
            tl.store(starts + entry, h)
            starts += N * E_PADDED
        for j in tl.static_range(UNROLLED):
            at = u + j * E, dt + j * E, shifted(z, j * E), y + j * E, B + j * N, C + j * N, shifted(codes, j)
            h = _token(h, A, skip, offset, at, n, inside, RAGGED, SOFTPLUS)
        u, dt, z, y = u + UNROLLED * E, dt + UNROLLED * E, shifted(z, UNROLLED * E), y + UNROLLED * E
        B, C, codes = B + UNROLLED * N, C + UNROLLED * N, shifted(codes, UNROLLED)
    if tokens // UNROLLED % (CHUNK // UNROLLED) == 0:
        if tokens % UNROLLED > 0:
            tl.store(starts + entry, h)
    for _ in range(0, tokens % UNROLLED):
        h = _token(h, A, skip, offset, (u, dt, z, y, B, C, codes), n, inside, RAGGED, SOFTPLUS)
        u, dt, z, y = u + E, dt + E, shifted(z, E), y + E
        B, C, codes = B + N, C + N, shifted(codes, 1)
    if segment == SEGMENTS - 1:
        tl.store(state + b * (N * E_PADDED) + entry, h)
