"""What the Triton kernels of state-space duality share: a chunk's decays, products on the matrix units, the states of segments.

A start of a document is a log decay of -CUT: 2^-256 is 0 in fp32, and so is every decay across it. Stronger decays are cut off
there as well, so that sums over a chunk of 64 tokens stay within what fp32 adds up exactly.

Tokens j and i of a chunk are rows and columns of tiles, as their names say. A state is (N, K): both products with it then take
operands as they lie in memory. Loops that have no constants as bounds are pipelined by the compiler where they are innermost.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
CUT = tl.constexpr(256.0)
# Behind log decays of this sum nothing is left in fp32: walks along a row end here.
LIMIT = tl.constexpr(-200.0)
# Log decays are added up in two parts: multiples of 1/GRID, whose sums are exact down to -32,768, and what is left.
GRID = tl.constexpr(512.0)
LEAST = tl.constexpr(2.0**-126)  # a step size of 0, where its logarithm is taken
START = tl.constexpr(2)  # the code of a token that starts a document; 0 is padding


@triton.jit
def log_decays(dt_Q, code_Q, rate, PACKED: tl.constexpr):
    """Of each token, in powers of 2; `rate` is A log2(e)."""
    log_Q = tl.maximum(dt_Q * rate, -CUT)
    if PACKED:
        log_Q = tl.where(code_Q == START, -CUT, log_Q)
    return log_Q


@triton.jit
def parts(log_Q):
    """The two parts of log decays."""
    whole_Q = tl.floor(log_Q * GRID + 0.5) * (1.0 / GRID)
    return whole_Q, log_Q - whole_Q


@triton.jit
def load_codes(codes, start, q_Q, S, PACKED: tl.constexpr):
    """(which tokens of a chunk are real, their codes)."""
    inside_Q = start + q_Q < S
    code_Q = inside_Q.to(tl.int32)
    if PACKED:
        code_Q = tl.load(codes + start + q_Q, mask=inside_Q, other=0)
        return code_Q > 0, code_Q
    return inside_Q, code_Q


@triton.jit
def load_tile(base, start, keep_Q, q_Q, width_M, stride: tl.constexpr):
    """Tokens `start` and behind of an array whose tokens lie `stride` apart; 0 where they are not real."""
    tile = base + start.to(tl.int64) * stride + (q_Q[:, None] * stride + width_M[None, :])
    return tl.load(tile, mask=keep_Q[:, None], other=0.0)


@triton.jit
def store_tile(base, start, inside_Q, q_Q, width_M, stride: tl.constexpr, tile_QM):
    """The inverse of `load_tile`, in the dtype of memory."""
    tile = base + start.to(tl.int64) * stride + (q_Q[:, None] * stride + width_M[None, :])
    tl.store(tile, tile_QM.to(base.dtype.element_ty), mask=inside_Q[:, None])


@triton.jit
def product(a, b, KIND: tl.constexpr, UNIT: tl.constexpr):
    """a @ b of operands rounded to KIND, summed in fp32. fp32 operands are three products of TF32."""
    return tl.dot(a.to(KIND).to(UNIT), b.to(KIND).to(UNIT), input_precision="tf32x3")


@triton.jit
def add_product(total, a, b, KIND: tl.constexpr, UNIT: tl.constexpr):
    """total + a @ b."""
    return tl.dot(a.to(KIND).to(UNIT), b.to(KIND).to(UNIT), total, input_precision="tf32x3")


@triton.jit
def add_exact(total, a, b, KIND: tl.constexpr, UNIT: tl.constexpr):
    """total + a @ b of an operand that is exact in KIND and one in fp32, which goes in two parts: to 2.5e-6 of its size."""
    total = add_product(total, a, b, KIND, UNIT)
    if KIND != tl.float32:
        total = add_product(total, a, b - b.to(KIND).to(tl.float32), KIND, UNIT)
    return total


@triton.jit
def sums(log_Q):
    """Of the log decays of a chunk's tokens: those up to each and those behind each, and that of all."""
    whole_Q, part_Q = parts(log_Q)
    whole, part = tl.sum(whole_Q), tl.sum(part_Q)
    until_Q, part_until_Q = tl.cumsum(whole_Q), tl.cumsum(part_Q)
    return until_Q + part_until_Q, (whole - until_Q) + (part - part_until_Q), whole + part


@triton.jit
def differences(log_Q):
    """Of sums up to tokens, at [row, column]: that of the row less that of the column, with all digits of both."""
    whole_Q, part_Q = parts(log_Q)
    whole_Q, part_Q = tl.cumsum(whole_Q), tl.cumsum(part_Q)
    return (whole_Q[:, None] - whole_Q[None, :]) + (part_Q[:, None] - part_Q[None, :])


@triton.jit
def state_in_front(
    edge, states, totals, at_NK, turned_NK, stretches, segment, SEGMENTS: tl.constexpr, SIZE: tl.constexpr, REVERSE: tl.constexpr
):  # fmt: skip
    """What reaches a segment from those on its other side and from the state at the edge of the row; for gradients in REVERSE.

    The nearest segment first, and no further than anything is left.

    Args:
      edge: the state at the edge, which lies (K, N).
      states, totals: what each segment makes of zero, (N, K), and the sum of its log decays.
      at_NK, turned_NK: where the numbers stand in a state, (N, K) and (K, N), of SIZE numbers.
      stretches: how many segments of other rows and heads stand in front of this row's.
    """
    state_NK = tl.zeros(at_NK.shape, tl.float32)
    log = 0.0
    if SEGMENTS > 1:
        step: tl.constexpr = 1 if REVERSE else -1
        other = segment + step
        while (other >= 0) & (other < SEGMENTS) & (log > LIMIT):
            at = stretches + other
            state_NK += tl.exp2(log) * tl.load(states + at * SIZE + at_NK)
            log += tl.load(totals + at)
            other += step
    return state_NK + tl.exp2(log) * tl.load(edge + turned_NK)
