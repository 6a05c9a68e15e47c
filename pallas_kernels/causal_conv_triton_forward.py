"""The forward pass of the causal convolution in Triton: a program goes through a stretch of a row, for a block of channels."""

import triton
import triton.language as tl

from pallas_kernels.causal_conv_triton_token import convolved, only, opening, passed
from pallas_kernels.selective_scan_triton_token import loaded, put_row, row, shifted, sigmoid


@triton.jit
def _token(x, word, y, taps, weights, inside, RAGGED: tl.constexpr, SILU: tl.constexpr, W: tl.constexpr):
    """The taps of the next token, after the output of this one is stored."""
    _, out = convolved(x, word, taps, weights, W)
    if SILU:
        out *= sigmoid(out)
    put_row(y, only(word, 0, out), inside, RAGGED)
    return passed(x, taps, W)


@triton.jit
def forward_kernel(
    x,
    initial,
    weights,
    words,
    y,
    S: tl.constexpr,
    E: tl.constexpr,
    W: tl.constexpr,
    STRETCH: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLLED: tl.constexpr,
    SILU: tl.constexpr,
):
    b = tl.program_id(2).to(tl.int64)
    RAGGED: tl.constexpr = E % BLOCK != 0
    d, first = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1) * STRETCH
    inside, token, tokens = d < E, b * S + first, tl.minimum(S - first, STRETCH)
    x, y, words = x + token * E + d, y + token * E + d, shifted(words, token)
    w, taps = opening(x, initial + b * ((W - 1) * E), weights, first, d, E, W)
    for _ in range(0, tokens // UNROLLED):
        given = ()  # all at once, for no load is moved over a store
        for j in tl.static_range(UNROLLED):
            given = given + ((row(x + j * E, inside, RAGGED), loaded(shifted(words, j))),)
        for j in tl.static_range(UNROLLED):
            taps = _token(given[j][0], given[j][1], y + j * E, taps, w, inside, RAGGED, SILU, W)
        x, y, words = x + UNROLLED * E, y + UNROLLED * E, shifted(words, UNROLLED)
    for _ in range(0, tokens % UNROLLED):
        taps = _token(row(x, inside, RAGGED), loaded(words), y, taps, w, inside, RAGGED, SILU, W)
        x, y, words = x + E, y + E, shifted(words, 1)
