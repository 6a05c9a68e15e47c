"""What the Triton kernels of the selective scan compute for one token, and how they reach it in memory.

All arithmetic is fp32. Powers are of two: rates come in units of log2(e), and the kernels' `exp2` is one instruction.
"""

import math

import numpy as np
import triton
import triton.language as tl

LOG2E, LN2 = tl.constexpr(float(np.float32(math.log2(math.e)))), tl.constexpr(math.log(2))
LOG2E_TAIL = tl.constexpr(math.log2(math.e) - LOG2E.value)  # what fp32 has not of it
# dt of the decay where a document starts, so that nothing is left: rates are at most -1e-27, and exp2(-1e30 * 1e-27) is 0.
FOREVER = tl.constexpr(1e30)
# Its power of two is 0 in fp32: what decays by that much changes no bit.
FORGOTTEN = tl.constexpr(-150.0)
# What a token is: padding, an ordinary one, one before which the state is dropped.
REAL, RESET = tl.constexpr(1), tl.constexpr(2)


@triton.jit
def softplus(x):
    """log(1 + exp(x)), to 3e-7 of itself down to steps of 1e-13: what rounding takes from the exponent is added behind exp2, and
    the logarithm of one plus what is at most 1 is a polynomial, for no unit has it to more than 2e-7 absolute."""
    size = tl.minimum(tl.abs(x), 128.0)
    exponent = size * -LOG2E
    lost = tl.fma(size, -LOG2E_TAIL, tl.fma(size, -LOG2E, -exponent))
    e = tl.exp2(exponent)
    e += e * (lost * LN2)
    p = e * 0.005232691299170256 - 0.029505226761102676
    p = p * e + 0.07822593301534653
    p = p * e - 0.13663244247436523
    p = p * e + 0.19106006622314453
    p = p * e - 0.2484298199415207
    p = p * e + 0.3331909775733948
    p = p * e - 0.4999949336051941
    p = p * e + 0.9999999403953552
    return tl.maximum(x, 0.0) + p * e


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), the quotient as the square of a root, which is two instructions where a division is eight."""
    root = tl.rsqrt(1.0 + tl.exp2(x * -LOG2E))
    return root * root


@triton.jit
def row(at, inside, RAGGED: tl.constexpr):
    """The channels of a token, or of several, in fp32."""
    if RAGGED:
        x = tl.load(at, mask=inside, other=0.0)
    else:
        x = tl.load(at)
    return x.to(tl.float32)


@triton.jit
def put_row(at, x, inside, RAGGED: tl.constexpr):
    """Stores what `row` loads."""
    if RAGGED:
        tl.store(at, x.to(at.dtype.element_ty), mask=inside)
    else:
        tl.store(at, x.to(at.dtype.element_ty))


@triton.jit
def step_size(dt, bias, code, SOFTPLUS: tl.constexpr):
    """dt of a token in the state's input: 0 at padding."""
    if bias is not None:
        dt += bias
    if SOFTPLUS:
        dt = softplus(dt)
    if code is not None:
        dt = tl.where(code < REAL, 0.0, dt)
    return dt


@triton.jit
def decaying(dt, code):
    """dt of a token in the state's decay."""
    if code is not None:
        dt = tl.where(code == RESET, FOREVER, dt)
    return dt


@triton.jit
def shifted(at, by):
    """A pointer further on; None stays None."""
    if at is None:
        return None
    else:
        return at + by


@triton.jit
def loaded(at):
    """What a pointer points to; None stays None."""
    if at is None:
        return None
    else:
        return tl.load(at)


@triton.jit
def remembered(slow, so_far, inside):
    """Whether anything is left of what lies `so_far` away, of any channel of the block; `slow`: rates of the slowest states."""
    return tl.max(tl.where(inside, slow * so_far, FORGOTTEN)) > FORGOTTEN


@triton.jit
def behind(
    state, A, slow, elapsed, stretch, entry, d, inside, STEP: tl.constexpr, count, STATE: tl.constexpr, WIDTH: tl.constexpr
):
    """What `count` segments make of a state that lies behind them; it stops where nothing is left of it.

    `elapsed` and `stretch` point to the nearest segment, and STEP segments further on to the one behind it. What belongs to
    channels alone (`slow`, `d`, `inside`) has one state.
    """
    total, so_far = A * 0.0, slow * 0.0
    going = count > 0
    while going:
        total += tl.exp2(A * so_far) * tl.load(stretch + entry)
        so_far += tl.load(elapsed + d)
        elapsed, stretch = elapsed + STEP * WIDTH, stretch + STEP * STATE
        count -= 1
        going = (count > 0) & remembered(slow, so_far, inside)
    return total + tl.exp2(A * so_far) * state
