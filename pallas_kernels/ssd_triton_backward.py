"""State-space duality on a GPU, backward: block by block from the last of a segment to the first, for some heads of a group.

With P_ij = exp(s_i - s_j) for j <= i of one document, f_i = exp(s_i), e_j = exp(s_Q - s_j), h the state in front of the chunk and
g the gradient of the one behind it; sums over the heads of a group are written sum_h:

    u_j   = sum_i (C_i . B_j) P_ij dy_i + e_j g B_j;         dx_j = dt_j u_j + D dy_j
    dW_ij = sum_h P_ij dt_j (x_j . dy_i);                    dh   = exp(s_Q) g + sum_i f_i dy_i (x) C_i
    dC_i  = sum_j dW_ij B_j + sum_h f_i h dy_i;              dB_j = sum_i dW_ij C_i + sum_h e_j dt_j g x_j
    da_k  = sum_{j<k<=i} Q_ij + sum_{i>=k} f_i dy_i . h C_i + sum_{j<k} e_j dt_j x_j . g B_j + exp(s_Q) g . h
    ddt_k = x_k . u_k + A da_k;                              Q_ij = (C_i . B_j) P_ij dt_j (x_j . dy_i)

Four kernels: the states in front of every chunk, block by block; the gradients of the states behind them, segment by segment from
its last chunk to the first; then each chunk by itself, the pairs of its tokens head by head, and dB and dC for all heads of a
group, so that they leave the chip as sums. They take a stripe of the row at a time, so that what lies between them stays small.
The sum of Q over pairs around k is a sum from k on of (sum_{j<i} Q_ij - sum_{i'>i} Q_i'i): pairs of a token with itself, which
would have to cancel, are not in it.

Pairs stand turned, (j, i), and dW goes through memory, because no product may take the transpose of another's result: for Hopper
that has been compiled wrongly (Triton 3.4 and later).
"""

import triton
import triton.language as tl

from pallas_kernels.ssd_triton_chunk import (
    CUT,
    LOG2E,
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
def states_kernel(
    x, dt, codes, B, A, starts, offset, inner,
    S: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr,
    Q: tl.constexpr, CHUNKS: tl.constexpr, STRIPE: tl.constexpr,
    PACKED: tl.constexpr, KIND: tl.constexpr, UNIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The states in front of the chunks of a block, from that in front of the block."""
    which, block, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    head, first_k = which // (K // WIDTH), which % (K // WIDTH) * WIDTH
    row_head, first = row * H + head, tl.load(offset) + block * (CHUNKS * Q)
    rate = tl.load(A + head) * LOG2E
    q_Q, n_N, k_K = tl.arange(0, Q), tl.arange(0, N), tl.arange(0, WIDTH)
    at_NK = n_N[:, None] * K + (first_k + k_K)[None, :]
    x += row * S * (H * K) + head * K + first_k
    B += row * S * (G * N) + head // (H // G) * N
    dt += row_head * S
    if PACKED:
        codes += row * S
    inner += (row_head * STRIPE + block * CHUNKS) * (N * K)
    blocks = tl.cdiv(S, CHUNKS * Q)
    if first < S:
        h_NK = tl.load(starts + (row_head * blocks + first // (CHUNKS * Q)) * (N * K) + at_NK)
        for c in tl.range(CHUNKS, num_stages=STAGES):
            start = first + c * Q
            tl.store(inner + c * (N * K) + at_NK, h_NK.to(inner.dtype.element_ty))
            keep_Q, code_Q = load_codes(codes, start, q_Q, S, PACKED)
            dt_Q = tl.load(dt + start + q_Q, mask=start + q_Q < S, other=0.0)
            _, behind_Q, total = sums(log_decays(dt_Q, code_Q, rate, PACKED))
            x_QK = load_tile(x, start, keep_Q, q_Q, k_K, H * K).to(tl.float32) * (tl.exp2(behind_Q) * dt_Q)[:, None]
            B_QN = load_tile(B, start, keep_Q, q_Q, n_N, G * N)
            h_NK = add_product(h_NK * tl.exp2(total), tl.trans(B_QN), x_QK, KIND, UNIT)


@triton.jit
def gradients_kernel(
    dt, codes, C, A, dy, dfinal, states, totals, inner, offset, behind, da, dinitial,
    S: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr,
    Q: tl.constexpr, CHUNKS: tl.constexpr, BLOCKS: tl.constexpr, SEGMENTS: tl.constexpr, STRIPE: tl.constexpr,
    PACKED: tl.constexpr, KIND: tl.constexpr, UNIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradients of the states behind the chunks of a segment, and of that in front of the stripe; what states add to da."""
    which, segment, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    WIDTHS: tl.constexpr = K // WIDTH
    head, first_k = which // WIDTHS, which % WIDTHS * WIDTH
    row_head, first_chunk, first = row * H + head, segment * (BLOCKS * CHUNKS), tl.load(offset)
    rate = tl.load(A + head) * LOG2E
    q_Q, n_N, k_K = tl.arange(0, Q), tl.arange(0, N), tl.arange(0, WIDTH)
    at_NK, turned_NK = n_N[:, None] * K + (first_k + k_K)[None, :], (first_k + k_K)[None, :] * N + n_N[:, None]
    dy += row * S * (H * K) + head * K + first_k
    C += row * S * (G * N) + head // (H // G) * N
    dt += row_head * S
    if PACKED:
        codes += row * S
    inner += row_head * STRIPE * (N * K)
    behind += row_head * STRIPE * (N * K)
    da += (row_head * WIDTHS + which % WIDTHS) * (STRIPE * Q)
    edge = dfinal + row_head * (N * K)
    g_NK = state_in_front(edge, states, totals, at_NK, turned_NK, row_head * SEGMENTS, segment, SEGMENTS, N * K, True)
    count = tl.minimum(BLOCKS * CHUNKS, tl.minimum(STRIPE, tl.cdiv(S - first, Q)) - first_chunk)
    for done in tl.range(count, num_stages=STAGES, disable_licm=True):
        chunk = first_chunk + count - 1 - done
        start = first + chunk * Q
        tl.store(behind + chunk.to(tl.int64) * (N * K) + at_NK, g_NK.to(behind.dtype.element_ty))
        keep_Q, code_Q = load_codes(codes, start, q_Q, S, PACKED)
        dt_Q = tl.load(dt + start + q_Q, mask=start + q_Q < S, other=0.0)
        h_NK = tl.load(inner + chunk.to(tl.int64) * (N * K) + at_NK)
        dy_QK = load_tile(dy, start, keep_Q, q_Q, k_K, H * K)
        C_QN = load_tile(C, start, keep_Q, q_Q, n_N, G * N)
        log_Q = log_decays(dt_Q, code_Q, rate, PACKED)
        until_Q, _, total = sums(log_Q)
        dy_left_QK = dy_QK.to(tl.float32) * tl.exp2(until_Q)[:, None]
        g_NK *= tl.exp2(total)
        from_Q = tl.sum(product(C_QN, h_NK, KIND, UNIT) * dy_left_QK, 1)
        da_Q = tl.cumsum(from_Q, reverse=True) + tl.sum(g_NK * h_NK.to(tl.float32))
        tl.store(da + chunk * Q + q_Q, tl.where(log_Q > -CUT, da_Q, 0.0))
        g_NK = add_product(g_NK, tl.trans(C_QN), dy_left_QK, KIND, UNIT)
    if segment == 0:
        tl.store(dinitial + row_head * (N * K) + turned_NK, g_NK)


@triton.jit
def pairs_kernel(
    x, dt, codes, B, C, A, D, dy, behind, offset, dx, direct, da, dD, dpairs,
    S: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr,
    Q: tl.constexpr, STRIPE: tl.constexpr, PACKED: tl.constexpr, KIND: tl.constexpr, UNIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx and dW of a chunk and head; ddt in two pieces, without what `gradients_kernel` has found; dD of each token."""
    head, chunk, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row_head, start, here = row * H + head, tl.load(offset) + chunk * Q, (chunk * Q).to(tl.int64)
    q_Q, n_N, k_K = tl.arange(0, Q), tl.arange(0, N), tl.arange(0, WIDTH)
    x += row * S * (H * K) + head * K
    dy += row * S * (H * K) + head * K
    dx += row * (STRIPE * Q * H * K) + head * K
    group = row * S * (G * N) + head // (H // G) * N
    if PACKED:
        codes += row * S
    keep_Q, code_Q = load_codes(codes, start, q_Q, S, PACKED)
    inside_Q = start + q_Q < S
    dt_Q = tl.load(dt + row_head * S + start + q_Q, mask=inside_Q, other=0.0)
    log_Q = log_decays(dt_Q, code_Q, tl.load(A + head) * LOG2E, PACKED)
    until_Q, behind_Q, _ = sums(log_Q)
    B_QN = load_tile(B + group, start, keep_Q, q_Q, n_N, G * N)
    C_QN = load_tile(C + group, start, keep_Q, q_Q, n_N, G * N)

    if KIND == tl.float32:
        log_ji = -differences(log_Q)
    else:
        log_ji = until_Q[None, :] - until_Q[:, None]
    decay_ji = tl.exp2(tl.where(q_Q[:, None] <= q_Q[None, :], log_ji, -CUT))
    change_ji = tl.zeros((Q, Q), tl.float32)
    for w in tl.range(K // WIDTH, num_stages=STAGES, disable_licm=True):
        x_QK = load_tile(x + w * WIDTH, start, keep_Q, q_Q, k_K, H * K)
        dy_QK = load_tile(dy + w * WIDTH, start, keep_Q, q_Q, k_K, H * K)
        change_ji = add_product(change_ji, x_QK, tl.trans(dy_QK), KIND, UNIT)
    skipped_Q = tl.sum(tl.where(q_Q[:, None] == q_Q[None, :], change_ji, 0.0), 1)
    change_ji *= decay_ji * dt_Q[:, None]
    dpairs += (row_head * STRIPE + chunk) * (Q * Q)
    tl.store(dpairs + (q_Q[:, None] * Q + q_Q[None, :]), change_ji.to(dpairs.dtype.element_ty))
    pairs_ji = product(B_QN, tl.trans(C_QN), KIND, UNIT)
    change_ji = tl.where(q_Q[:, None] < q_Q[None, :], change_ji * pairs_ji, 0.0)
    from_Q = tl.sum(change_ji, 0) - tl.sum(change_ji, 1)
    pairs_ji = (pairs_ji * decay_ji).to(KIND)

    across_Q = tl.zeros((Q,), tl.float32)
    direct_Q = tl.zeros((Q,), tl.float32)
    for w in tl.range(K // WIDTH, num_stages=STAGES, disable_licm=True):
        x_QK = load_tile(x + w * WIDTH, start, keep_Q, q_Q, k_K, H * K)
        dy_QK = load_tile(dy + w * WIDTH, start, keep_Q, q_Q, k_K, H * K)
        at_NK = n_N[:, None] * K + w * WIDTH + k_K[None, :]
        g_NK = tl.load(behind + (row_head * STRIPE + chunk) * (N * K) + at_NK)
        u_QK = product(B_QN, g_NK, KIND, UNIT) * tl.exp2(behind_Q)[:, None]
        across_Q += tl.sum(x_QK.to(tl.float32) * u_QK, 1)
        u_QK = add_product(u_QK, pairs_ji, dy_QK, KIND, UNIT)
        direct_Q += tl.sum(x_QK.to(tl.float32) * u_QK, 1)
        u_QK = u_QK * dt_Q[:, None] + tl.load(D + head) * dy_QK.to(tl.float32)
        store_tile(dx + w * WIDTH, here, inside_Q, q_Q, k_K, H * K, u_QK)
    across_Q *= dt_Q
    da_Q = tl.cumsum(from_Q, reverse=True) + (tl.cumsum(across_Q) - across_Q)
    out = row_head * (STRIPE * Q) + here + q_Q
    tl.store(da + out, tl.where(log_Q > -CUT, da_Q, 0.0))
    tl.store(direct + out, direct_Q)
    tl.store(dD + out, skipped_Q)


@triton.jit
def maps_kernel(
    x, dt, codes, B, C, A, dy, inner, behind, dpairs, offset, dB, dC,
    S: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr,
    Q: tl.constexpr, STRIPE: tl.constexpr, PACKED: tl.constexpr, KIND: tl.constexpr, UNIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dB and dC of a chunk, of all heads of a group."""
    group, chunk, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    R: tl.constexpr = H // G
    start, here, first_head = tl.load(offset) + chunk * Q, (chunk * Q).to(tl.int64), group * R
    row_head = row * H + first_head
    q_Q, n_N, k_K = tl.arange(0, Q), tl.arange(0, N), tl.arange(0, WIDTH)
    at_NK = n_N[:, None] * K + k_K[None, :]
    x += row * S * (H * K) + first_head * K
    dy += row * S * (H * K) + first_head * K
    of_group = row * S * (G * N) + group * N
    if PACKED:
        codes += row * S
    keep_Q, code_Q = load_codes(codes, start, q_Q, S, PACKED)
    inside_Q = start + q_Q < S
    dB_QN = tl.zeros((Q, N), tl.float32)
    dC_QN = tl.zeros((Q, N), tl.float32)
    for i in tl.range(R * (K // WIDTH), num_stages=2, disable_licm=True):
        r, k = i // (K // WIDTH), i % (K // WIDTH) * WIDTH
        dt_Q = tl.load(dt + (row_head + r) * S + start + q_Q, mask=inside_Q, other=0.0)
        until_Q, behind_Q, _ = sums(log_decays(dt_Q, code_Q, tl.load(A + first_head + r) * LOG2E, PACKED))
        of_head = ((row_head + r) * STRIPE + chunk) * (N * K) + k
        x_QK = load_tile(x + r * K + k, start, keep_Q, q_Q, k_K, H * K)
        g_NK = tl.load(behind + of_head + at_NK)
        dB_QN = add_product(dB_QN, x_QK.to(tl.float32) * (tl.exp2(behind_Q) * dt_Q)[:, None], tl.trans(g_NK), KIND, UNIT)
        dy_QK = load_tile(dy + r * K + k, start, keep_Q, q_Q, k_K, H * K)
        h_NK = tl.load(inner + of_head + at_NK)
        dC_QN = add_product(dC_QN, dy_QK.to(tl.float32) * tl.exp2(until_Q)[:, None], tl.trans(h_NK), KIND, UNIT)
    dpairs_ji = tl.zeros((Q, Q), tl.float32)
    for r in tl.range(R, disable_licm=True):
        of_head = ((row_head + r) * STRIPE + chunk) * (Q * Q)
        dpairs_ji += tl.load(dpairs + of_head + (q_Q[:, None] * Q + q_Q[None, :])).to(tl.float32)
    dpairs_ji = dpairs_ji.to(KIND)
    dB_QN = add_product(dB_QN, dpairs_ji, load_tile(C + of_group, start, keep_Q, q_Q, n_N, G * N), KIND, UNIT)
    store_tile(dB + row * (STRIPE * Q * G * N) + group * N, here, inside_Q, q_Q, n_N, G * N, dB_QN)
    dC_QN = add_product(dC_QN, tl.trans(dpairs_ji), load_tile(B + of_group, start, keep_Q, q_Q, n_N, G * N), KIND, UNIT)
    store_tile(dC + row * (STRIPE * Q * G * N) + group * N, here, inside_Q, q_Q, n_N, G * N, dC_QN)
