"""What a segment of a row does to a state, and to the gradient of a state, in Triton.

    state behind the segment = sum over t of exp(A (dt_(t+1) + ... + dt_last)) dt_t u_t B_t
    gradient before it       = sum over t of exp(A (dt_first + ... + dt_t)) C_t dy_t

A program walks away from that end of the segment for which it sums, and stops where nothing further can change a bit: where a
document starts, or where even the slowest state of every channel of the block has decayed to 0. Steps of trained models make
that some thousand tokens, however long the segment.
"""

import triton
import triton.language as tl

from pallas_kernels.selective_scan_triton_token import REAL, decaying, loaded, remembered, row, shifted, sigmoid, step_size


@triton.jit
def _add(total, so_far, near, A, bias, at, n, inside, RAGGED: tl.constexpr, SOFTPLUS: tl.constexpr, GRADIENT: tl.constexpr):
    """(total, dt of this group of tokens) with one token more."""
    x, dt, z, maps, codes = at
    code = loaded(codes)
    step = step_size(row(dt, inside, RAGGED), bias, code, SOFTPLUS)
    weight = row(x, inside, RAGGED)
    if z is not None:
        gate = row(z, inside, RAGGED)
        weight *= gate * sigmoid(gate)
    if GRADIENT:
        near += decaying(step, code)
        if code is not None:
            weight = tl.where(code < REAL, 0.0, weight)
    else:
        weight *= step
    total += tl.exp2(A * (so_far + near)[None, :]) * (tl.load(maps + n)[:, None] * weight[None, :])
    if not GRADIENT:
        near += decaying(step, code)
    return total, near


@triton.jit
def stretch_kernel(
    x,
    dt,
    z,
    maps,
    rate,
    slowest,
    bias,
    codes,
    elapsed,
    stretch,
    S: tl.constexpr,
    E: tl.constexpr,
    E_PADDED: tl.constexpr,
    N: tl.constexpr,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    UNROLLED: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    """x is u and maps B, tokens go from last to first; with GRADIENT x is dy, maps C, and tokens go from first to last."""
    segment, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    RAGGED: tl.constexpr = E % BLOCK != 0
    n, d = tl.arange(0, N), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = d < E
    entry = tl.max_contiguous(n[:, None] * E_PADDED + d[None, :], (1, NEIGHBOURS))
    d = tl.max_contiguous(d, NEIGHBOURS)
    A, slow = tl.load(rate + entry), tl.load(slowest + d)
    offset = loaded(shifted(bias, d))
    tokens = tl.minimum(S - segment * SEGMENT, SEGMENT)
    STEP: tl.constexpr = 1 if GRADIENT else -1
    token = b * S + segment * SEGMENT
    if not GRADIENT:
        token += tokens - 1
    x, dt, z = x + token * E + d, dt + token * E + d, shifted(z, token * E + d)
    maps, codes = maps + token * N, shifted(codes, token)
    total, so_far = tl.zeros((N, BLOCK), tl.float32), tl.zeros((BLOCK,), tl.float32)
    groups, rest = tokens // UNROLLED, tokens % UNROLLED
    going = groups > 0
    while going:
        near = tl.zeros((BLOCK,), tl.float32)  # summed apart from what lies behind: fewer roundings than one long sum has
        for j in tl.static_range(UNROLLED):
            at = x + j * STEP * E, dt + j * STEP * E, shifted(z, j * STEP * E), maps + j * STEP * N, shifted(codes, j * STEP)
            total, near = _add(total, so_far, near, A, offset, at, n, inside, RAGGED, SOFTPLUS, GRADIENT)
        so_far += near
        x, dt, z = x + UNROLLED * STEP * E, dt + UNROLLED * STEP * E, shifted(z, UNROLLED * STEP * E)
        maps, codes = maps + UNROLLED * STEP * N, shifted(codes, UNROLLED * STEP)
        groups -= 1
        going = (groups > 0) & remembered(slow, so_far, inside)
    going = (rest > 0) & remembered(slow, so_far, inside)
    while going:
        near = tl.zeros((BLOCK,), tl.float32)
        at = x, dt, z, maps, codes
        total, near = _add(total, so_far, near, A, offset, at, n, inside, RAGGED, SOFTPLUS, GRADIENT)
        so_far += near
        x, dt, z = x + STEP * E, dt + STEP * E, shifted(z, STEP * E)
        maps, codes = maps + STEP * N, shifted(codes, STEP)
        rest -= 1
        going = (rest > 0) & remembered(slow, so_far, inside)
    at = b * SEGMENTS + segment
    tl.store(elapsed + at * E_PADDED + d, so_far)
    tl.store(stretch + at * (N * E_PADDED) + entry, total)
