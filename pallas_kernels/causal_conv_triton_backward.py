"""The backward pass of the causal convolution in Triton: a program goes through a stretch of a row, for a block of channels.

The last W - 1 inputs stay in registers, and so do the gradients of those inputs, each of which gets one more share with every
token and is complete W - 1 tokens later. So a stretch ends with the W - 1 tokens behind it, of which it needs the shares.
"""

import triton
import triton.language as tl

from pallas_kernels.causal_conv_triton_token import convolved, only, opening, passed, these
from pallas_kernels.selective_scan_triton_token import loaded, put_row, row, shifted, sigmoid


@triton.jit
def _given(at, inside, RAGGED: tl.constexpr):
    """x, dy and word of a token."""
    x, dy, word = at
    return row(x, inside, RAGGED), row(dy, inside, RAGGED), loaded(word)


@triton.jit
def _given_if(there, at, d, E: tl.constexpr):
    """The same; where `there` does not hold, of a token that is none."""
    x, dy, words = at
    inside = these(d, there, E)
    if words is None:
        return row(x, inside, True), row(dy, inside, True), None
    else:
        return row(x, inside, True), row(dy, inside, True), tl.load(words, mask=there, other=0)


@triton.jit
def _token(now, state, weights, SILU: tl.constexpr, W: tl.constexpr, COUNTED: tl.constexpr):
    """The state behind a token, and the gradient of the input W - 1 tokens in front of it, which is complete.

    `state`: the taps; the gradients of those inputs so far, the nearest first; sums for dw and dbias.
    """
    x, g, word = now
    taps, shares, sums = state
    seen, before = convolved(x, word, taps, weights, W)
    if SILU:
        s = sigmoid(before)
        g *= s * (1.0 + before * (1.0 - s))
    g = only(word, 0, g)
    if COUNTED:
        added = ()
        for k in tl.static_range(W):
            added = added + (sums[k] + g * seen[k],)
        sums = added + (sums[W] + g,)
    new = (weights[0] * g,)
    for k in tl.static_range(1, W):
        new = new + (shares[k - 1] + weights[k] * only(word, k, g),)
    return (passed(x, taps, W), new[: W - 1], sums), new[W - 1]


@triton.jit
def backward_kernel(
    x,
    dy,
    initial,
    weights,
    words,
    dx,
    sums,
    S: tl.constexpr,
    E: tl.constexpr,
    W: tl.constexpr,
    STRETCH: tl.constexpr,
    STRETCHES: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLLED: tl.constexpr,
    SILU: tl.constexpr,
):
    b = tl.program_id(2).to(tl.int64)
    RAGGED: tl.constexpr = E % BLOCK != 0
    d, first = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1) * STRETCH
    inside, token, tokens = d < E, b * S + first, tl.minimum(S - first, STRETCH)
    x, dy, dx, words = x + token * E + d, dy + token * E + d, dx + (token - W + 1) * E + d, shifted(words, token)
    w, taps = opening(x, initial + b * ((W - 1) * E), weights, first, d, E, W)
    zero = tl.zeros((BLOCK,), tl.float32)
    shares, totals = (), (zero, zero)
    for _ in tl.static_range(1, W):
        shares, totals = shares + (zero,), totals + (zero,)
    state, own = (taps, shares, totals), first + W - 1  # what is complete before token `own` is of the stretch in front
    for i in range(0, tokens // UNROLLED):
        given = ()  # all at once, for no load is moved over a store
        for j in tl.static_range(UNROLLED):
            given = given + (_given((x + j * E, dy + j * E, shifted(words, j)), inside, RAGGED),)
        for j in tl.static_range(UNROLLED):
            state, complete = _token(given[j], state, w, SILU, W, True)
            put_row(dx + j * E, complete, these(d, first + i * UNROLLED + j >= own, E), True)
        x, dy, dx, words = x + UNROLLED * E, dy + UNROLLED * E, dx + UNROLLED * E, shifted(words, UNROLLED)
    for i in range(tokens // UNROLLED * UNROLLED, tokens):
        state, complete = _token(_given((x, dy, words), inside, RAGGED), state, w, SILU, W, True)
        put_row(dx, complete, these(d, first + i >= own, E), True)
        x, dy, dx, words = x + E, dy + E, dx + E, shifted(words, 1)
    for k in tl.static_range(W - 1):
        given = _given_if(first + tokens + k < S, (x + k * E, dy + k * E, shifted(words, k)), d, E)
        state, complete = _token(given, state, w, SILU, W, False)
        put_row(dx + k * E, complete, these(d, first + tokens + k >= own, E), True)
    sums += (b * STRETCHES + tl.program_id(1)) * ((W + 1) * E) + d
    for k in tl.static_range(W + 1):
        put_row(sums + k * E, state[2][k], inside, RAGGED)
