"""What the backward pass of the selective scan on GPUs computes for tokens and channels, and not for states: rows.

What stands at padding is finite, as `lcx.ops.selective_scan` asks.
"""

import triton.language as tl

from pallas_kernels.selective_scan_triton_token import FOREVER, LOG2E, REAL, RESET, decaying, sigmoid, step_size
from pallas_kernels.triton_shared import jit


@jit
def row_of(at, inside):
    """Rows in fp32, 0 where there are none."""
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@jit
def put_rows_of_states(given, t, within, left, kept, dts, xs, at, SOFTPLUS: tl.constexpr):
    """Puts what the states need of a group into shared memory, and its step sizes for later."""
    u, dt, codes, bias = given
    inside = (t < left)[:, None] & within
    code = None
    if codes is not None:
        code = tl.load(codes + t)[:, None]
    step = tl.where(inside, step_size(row_of(dt + at, inside), tl.load(bias)[None, :], code, SOFTPLUS), 0.0)
    kept.store(step)
    dts.store(decaying(step, code))
    xs.store(step * row_of(u + at, inside))


@jit
def put_rows(given, t, within, left, step, rows, at, GROUP: tl.constexpr, SOFTPLUS: tl.constexpr):
    """Puts what a group needs into shared memory: dt of the decay, x, dy behind the gate, and what its ddt is multiplied by.

    Returns u, and what the gradient of the gate is multiplied by.
    """
    u, dt, z, dy, codes, bias = given
    real, decay = t < left, step
    if codes is not None:
        code = tl.load(codes + t)
        real = real & (code >= REAL)
        decay = tl.where((code == RESET)[:, None], FOREVER, step)
    real, inside = real[:, None], (t < left)[:, None] & within
    slope = 1.0
    if SOFTPLUS:  # sigmoid(x) = exp(x - softplus(x)), which is as good for small steps as for large
        slope = tl.exp2((row_of(dt + at, inside) + tl.load(bias)[None, :] - step) * LOG2E)
    slope = tl.where(real, slope, 0.0 * step)
    value, gradient = row_of(u + at, inside), tl.where(real, row_of(dy + at, inside), 0.0)
    of_gate = gradient
    if z is not None:
        gate = row_of(z + at, inside)
        s = sigmoid(gate)
        passed = gate * s
        of_gate = gradient * (s + passed * (1.0 - s))
        gradient *= passed
    rows.slice(0, GROUP, 0).store(decay)
    rows.slice(GROUP, GROUP, 0).store(step * value)
    rows.slice(2 * GROUP, GROUP, 0).store(gradient)
    rows.slice(3 * GROUP, GROUP, 0).store(slope)
    return value, of_gate
