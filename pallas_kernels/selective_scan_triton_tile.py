"""What the backward pass of the selective scan in Triton computes beside the recurrence, and how the recurrence is laid out.

*Rows*: ROWS tokens by BLOCK channels; a thread has its own numbers, as the arrays lie in memory. *Tiles*: the N states of the
channels of one token, in two halves (N, HALF); 4 threads share a channel, with 4 states of 4 channels each, so that sums over
states and sums over channels both cross few threads. Between the two stands memory of the program's own.
"""

import triton
import triton.language as tl

from pallas_kernels.selective_scan_triton_token import FOREVER, LN2, LOG2E, REAL, RESET, sigmoid, softplus

# What a program's memory holds for each of ROWS tokens: dt of the decay, x, dy behind the gate; dt; what ddt, and dz, are
# multiplied by in the end; and what the recurrence leaves there, g . B, m . A, h . C.
DECAYING, X, DY, STEP, SLOPE, SLOPE_Z, GB, MA, Y = (tl.constexpr(i) for i in range(9))
SLOTS = tl.constexpr(9)


# Rows.


@triton.jit
def _fp32(at, mask):
    """A tile of tokens and channels."""
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def rows_before(given, codes, bias, rows, mask, tile, SIZE: tl.constexpr, SOFTPLUS: tl.constexpr):
    """Fills the memory of ROWS tokens with what the recurrence reads. Without `dy` only with what the states need."""
    u, dt, z, dy = given
    before = _fp32(dt, mask)
    if bias is not None:
        before += bias[None, :]
    step = before
    if SOFTPLUS:
        step = softplus(before)
    real = mask
    if codes is not None:
        code = tl.load(codes)[:, None]
        real = mask & (code >= REAL)
    if dy is not None:
        slope = 1.0
        if SOFTPLUS:  # sigmoid(x) = exp(x - softplus(x)), which is as good for small steps as for large
            slope = tl.exp2((before - step) * LOG2E)
        tl.store(rows + SLOPE * SIZE + tile, tl.where(real, slope, 0.0))
        gradient = tl.where(real, _fp32(dy, mask), 0.0)
        if z is not None:
            gate = _fp32(z, mask)
            s = sigmoid(gate)
            tl.store(rows + SLOPE_Z * SIZE + tile, gradient * (s * (1.0 + gate * (1.0 - s))))
            gradient *= gate * s
        tl.store(rows + DY * SIZE + tile, gradient)
    step = tl.where(real, step, 0.0)
    tl.store(rows + X * SIZE + tile, step * _fp32(u, mask))
    if dy is not None:
        tl.store(rows + STEP * SIZE + tile, step)
    if codes is not None:
        step = tl.where(code == RESET, FOREVER, step)
    tl.store(rows + DECAYING * SIZE + tile, step)


@triton.jit
def rows_after(u, D, rows, found, sums, mask, tile, SIZE: tl.constexpr):
    """Stores the gradients by token and channel of ROWS tokens, and adds to those of D and of the bias."""
    du, ddt, dz = found
    inner, gradient, u = tl.load(rows + GB * SIZE + tile), tl.load(rows + DY * SIZE + tile), _fp32(u, mask)
    of_u = tl.load(rows + STEP * SIZE + tile) * inner + D[None, :] * gradient
    tl.store(du, of_u.to(du.dtype.element_ty), mask=mask)
    of_step = (u * inner + tl.load(rows + MA * SIZE + tile) * LN2) * tl.load(rows + SLOPE * SIZE + tile)
    tl.store(ddt, of_step.to(ddt.dtype.element_ty), mask=mask)
    if dz is not None:
        of_gate = tl.load(rows + SLOPE_Z * SIZE + tile) * (tl.load(rows + Y * SIZE + tile) + D[None, :] * u)
        tl.store(dz, of_gate.to(dz.dtype.element_ty), mask=mask)
    dD, dbias = sums
    add_to(dD, tl.sum(gradient * u, axis=0))
    if dbias is not None:
        add_to(dbias, tl.sum(of_step, axis=0))


@triton.jit
def add_to(at, x):
    tl.store(at, x + tl.load(at))


# Tiles.
# Halves, because what has as many numbers as a warp has threads Triton loads one by a thread, and brings it to the 4 threads of a
# channel through shared memory; fewer numbers each thread loads itself.


@triton.jit
def pair(at, HALF: tl.constexpr):
    """Both halves of a block of channels."""
    return tl.load(at), tl.load(at + HALF)


@triton.jit
def put_pair(at, x, HALF: tl.constexpr):
    """Stores what `pair` loads."""
    tl.store(at, x[0])
    tl.store(at + HALF, x[1])


@triton.jit
def put_sum(at, tile, own, HALF: tl.constexpr):
    """Stores the sums over states of a tile of each half, a row each.

    A row in the form of a tile, of which only the first line is stored: otherwise Triton would first spread it over all threads.
    """
    zero = own * 0
    for s in tl.static_range(2):
        row = tl.broadcast_to(tl.sum(tile[s], axis=0)[None, :], tile[s].shape)
        tl.store(at[None, :] + zero + s * HALF, row, mask=own < HALF)


@triton.jit
def add_sum(at, tile, again, TOGETHER: tl.constexpr):
    """Adds the sums over channels of a tile to what stands there; where `again` does not hold, nothing does."""
    column = tl.sum(tile, axis=1)
    if TOGETHER > 1:
        column += tl.load(at, mask=again, other=0.0)
    tl.store(at, column)


@triton.jit
def advanced(h, A, now, B):
    """(decays, states) of the two halves after a token; `now`: its dt and x, each of the first half, then of the second."""
    dt_0, dt_1, x_0, x_1 = now
    a_0, a_1 = tl.exp2(A[0] * dt_0[None, :]), tl.exp2(A[1] * dt_1[None, :])
    return (a_0, a_1), (a_0 * h[0] + B[:, None] * x_0[None, :], a_1 * h[1] + B[:, None] * x_1[None, :])
