"""State-space duality on a GPU, forward: what a segment does to a state, and the outputs of a segment.

Programs are segments of a row, for WIDTH numbers of one head, chunk after chunk with the state in registers. Where a row has
several segments, a first kernel finds what each makes of a state of zero: from its last chunk to the first, no further than
anything is left.
"""

import triton
import triton.language as tl

from pallas_kernels.ssd_triton_chunk import (
    CUT,
    LEAST,
    LIMIT,
    LOG2E,
    add_exact,
    add_product,
    differences,
    load_codes,
    load_tile,
    log_decays,
    product,
    state_in_front,
    store_tile,
    sums,
)


@triton.jit
def stretch_kernel(
    x, dt, codes, maps, A, offset, states, totals,
    S: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr,
    Q: tl.constexpr, CHUNKS: tl.constexpr, BLOCKS: tl.constexpr, SEGMENTS: tl.constexpr, ALL: tl.constexpr,
    PACKED: tl.constexpr, REVERSE: tl.constexpr, KIND: tl.constexpr, UNIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The state behind each segment of ALL blocks from `offset` on; in REVERSE, of dy and C, the gradient in front of it."""
    which, segment, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    head, first_k = which // (K // WIDTH), which % (K // WIDTH) * WIDTH
    at, first = (row * H + head) * SEGMENTS + segment, tl.load(offset) + segment * (BLOCKS * CHUNKS * Q)
    rate = tl.load(A + head) * LOG2E
    q_Q, n_N, k_K = tl.arange(0, Q), tl.arange(0, N), tl.arange(0, WIDTH)
    x += row * S * (H * K) + head * K + first_k
    maps += row * S * (G * N) + head // (H // G) * N
    dt += (row * H + head) * S
    if PACKED:
        codes += row * S
    state_NK = tl.zeros((N, WIDTH), tl.float32)
    log = 0.0
    blocks = tl.minimum(BLOCKS, ALL - segment * BLOCKS)
    block = 0
    while (block < blocks) & (log > LIMIT):
        for c in tl.range(CHUNKS, num_stages=STAGES):
            done = block * CHUNKS + c
            start = first + (done if REVERSE else blocks * CHUNKS - 1 - done) * Q
            keep_Q, code_Q = load_codes(codes, start, q_Q, S, PACKED)
            dt_Q = tl.load(dt + start + q_Q, mask=start + q_Q < S, other=0.0)
            until_Q, behind_Q, total = sums(log_decays(dt_Q, code_Q, rate, PACKED))
            x_QK = load_tile(x, start, keep_Q, q_Q, k_K, H * K).to(tl.float32)
            map_QN = load_tile(maps, start, keep_Q, q_Q, n_N, G * N)
            if REVERSE:
                x_QK *= tl.exp2(log + until_Q)[:, None]
                state_NK = add_product(state_NK, tl.trans(map_QN), x_QK, KIND, UNIT)
            else:
                x_QK *= (tl.exp2(log + behind_Q) * dt_Q)[:, None]
                state_NK = add_exact(state_NK, tl.trans(map_QN), x_QK, KIND, UNIT)
            log += total
        block += 1
    tl.store(states + at * (N * K) + (n_N[:, None] * K + first_k + k_K[None, :]), state_NK)
    if first_k == 0:
        tl.store(totals + at, log)


@triton.jit
def forward_kernel(
    x, dt, codes, B, C, A, D, initial, states, totals, y, starts, final,
    S: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr,
    Q: tl.constexpr, CHUNKS: tl.constexpr, BLOCKS: tl.constexpr, SEGMENTS: tl.constexpr,
    PACKED: tl.constexpr, KIND: tl.constexpr, UNIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Outputs, the state in front of every block, and that behind the last token."""
    which, segment, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    head, first_k = which // (K // WIDTH), which % (K // WIDTH) * WIDTH
    row_head, first = row * H + head, segment * (BLOCKS * CHUNKS * Q)
    rate, skip = tl.load(A + head) * LOG2E, tl.load(D + head)
    q_Q, n_N, k_K = tl.arange(0, Q), tl.arange(0, N), tl.arange(0, WIDTH)
    at_NK, turned_NK = n_N[:, None] * K + (first_k + k_K)[None, :], (first_k + k_K)[None, :] * N + n_N[:, None]
    x += row * S * (H * K) + head * K + first_k
    y += row * S * (H * K) + head * K + first_k
    group = row * S * (G * N) + head // (H // G) * N
    B += group
    C += group
    dt += row_head * S
    if PACKED:
        codes += row * S
    starts += row_head * tl.cdiv(S, CHUNKS * Q) * (N * K)
    edge = initial + row_head * (N * K)
    h_NK = state_in_front(edge, states, totals, at_NK, turned_NK, row_head * SEGMENTS, segment, SEGMENTS, N * K, False)
    # What does not change is computed again in every chunk: kept, it would take more registers than there are.
    for c in tl.range(tl.minimum(BLOCKS * CHUNKS, tl.cdiv(S - first, Q)), num_stages=STAGES, disable_licm=True):
        start = first + c * Q
        if c % CHUNKS == 0:
            tl.store(starts + (start // (CHUNKS * Q)).to(tl.int64) * (N * K) + at_NK, h_NK)
        keep_Q, code_Q = load_codes(codes, start, q_Q, S, PACKED)
        inside_Q = start + q_Q < S
        dt_Q = tl.load(dt + start + q_Q, mask=inside_Q, other=0.0)
        C_QN = load_tile(C, start, keep_Q, q_Q, n_N, G * N)
        B_QN = load_tile(B, start, keep_Q, q_Q, n_N, G * N)
        x_QK = load_tile(x, start, keep_Q, q_Q, k_K, H * K)
        log_Q = log_decays(dt_Q, code_Q, rate, PACKED)
        until_Q, behind_Q, total = sums(log_Q)

        y_QK = product(C_QN, h_NK, KIND, UNIT) * tl.exp2(until_Q)[:, None]
        pairs_ij = product(C_QN, tl.trans(B_QN), KIND, UNIT)
        # Masked before exp2: above the diagonal it may overflow.
        visible_ij = q_Q[:, None] >= q_Q[None, :]
        if KIND == tl.float32:
            pairs_ij *= tl.exp2(tl.where(visible_ij, differences(log_Q), -CUT)) * dt_Q[None, :]
        else:  # is rounded to 8 bits
            log_ij = until_Q[:, None] - (until_Q - tl.log2(tl.maximum(dt_Q, LEAST)))[None, :]
            pairs_ij *= tl.exp2(tl.where(visible_ij, log_ij, -CUT))
        pairs_ij += tl.where(q_Q[:, None] == q_Q[None, :], skip, 0.0)  # the skip connection
        store_tile(y, start, inside_Q, q_Q, k_K, H * K, add_product(y_QK, pairs_ij, x_QK, KIND, UNIT))

        x_ahead_QK = x_QK.to(tl.float32) * (tl.exp2(behind_Q) * dt_Q)[:, None]
        h_NK = add_exact(h_NK * tl.exp2(total), tl.trans(B_QN), x_ahead_QK, KIND, UNIT)
    if segment == SEGMENTS - 1:
        tl.store(final + row_head * (N * K) + turned_NK, h_NK)
