"""What the Triton kernels of the causal convolution compute for one token, and with what a stretch of tokens begins.

A thread has some channels, and of them the last W - 1 inputs in registers, the nearest first. All arithmetic is fp32.
"""

import triton
import triton.language as tl

from pallas_kernels.selective_scan_triton_token import row


@triton.jit
def these(d, holds, E: tl.constexpr):
    """Which of channels d there are, if `holds`; else none."""
    return d < tl.where(holds, E, 0)


@triton.jit
def only(word, bit: tl.constexpr, x):
    """x where a bit is set, 0 elsewhere, even for what is not a number."""
    if word is None:
        return x
    else:
        return tl.where((word & (1 << bit)) != 0, x, 0.0)


@triton.jit
def opening(x, initial, weights, first, d, E: tl.constexpr, W: tl.constexpr):
    """(weights, the token's own first, then bias; the W - 1 inputs in front of token `first`, which x points to)."""
    inside = d < E
    w, taps = (row(weights + d, inside, True),), ()
    for k in tl.static_range(1, W):
        w = w + (row(weights + k * E + d, inside, True),)
        given = row(initial + (W - 1 - k + first) * E + d, these(d, first < k, E), True)
        taps = taps + (given + row(x - k * E, these(d, first >= k, E), True),)
    return w + (row(weights + W * E + d, inside, True),), taps


@triton.jit
def convolved(x, word, taps, weights, W: tl.constexpr):
    """(the W inputs that a token sees, sum of their products and the bias)."""
    seen = (only(word, 0, x),)
    total = weights[W] + weights[0] * seen[0]
    for k in tl.static_range(1, W):
        seen = seen + (only(word, k, taps[k - 1]),)
        total += weights[k] * seen[k]
    return seen, total


@triton.jit
def passed(x, taps, W: tl.constexpr):
    """The last W - 1 inputs, one token later."""
    if W > 1:
        return ((x,) + taps)[: W - 1]
    else:
        return taps
