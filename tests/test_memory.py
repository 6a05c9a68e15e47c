"""Temporary memory of one layer, from the compiler: linear in the length for flash, MST and BPT, quadratic for vanilla."""

import functools

import pytest

from lcx.mesh import make_mesh
from lcx.planning.memory import compiled_bytes
from lcx.planning.training import compile_layer
from tests.experiments import small

VARIANTS = {
    "vanilla": dict(pattern=("full",), block__token_chunk=0),
    "flash": dict(pattern=("blockwise",), block__token_chunk=0),
    "MST": dict(pattern=("blockwise",), block__token_chunk=256),
    "BPT": dict(pattern=("blockwise",), block__token_chunk=256, block__fuse_attention=True),
}


@functools.cache
def temp(variant: str, length: int) -> int:
    """Temporary bytes at a feed-forward eight times as wide as the model."""
    e = small(sequence__length=length, ffns__gated__width=256, model__layers=1, **VARIANTS[variant])
    return compiled_bytes(compile_layer(e, make_mesh()))["temporary"]


@pytest.mark.parametrize("variant", ["flash", "MST", "BPT"])
def test_memory_is_linear_in_the_length(variant):
    """A constant, then the same bytes for every further token."""
    short, middle, long = (temp(variant, length) for length in (2048, 4096, 8192))
    per_token = (middle - short) / 2048, (long - middle) / 4096
    assert per_token[1] <= 1.1 * per_token[0]


def test_vanilla_is_quadratic():
    """The twin: the figures of naive attention would fail the test above."""
    short, middle, long = (temp("vanilla", length) for length in (1024, 2048, 4096))
    assert (long - middle) / (middle - short) > 3.5


def test_chunking_the_feed_forward_saves_what_it_promises():
    """Flash keeps several S x F arrays; MST and BPT keep none."""
    wide = 4 * 8192 * 256
    assert temp("flash", 8192) - temp("MST", 8192) > 2 * wide
    assert temp("flash", 8192) - temp("BPT", 8192) > 2 * wide
