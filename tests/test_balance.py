"""How evenly the steps of a ring share their work: tiles that the kernels execute on every device, from their intervals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.ops.tiling import Tiling
from lcx.ops.types import Mask, Segments
from lcx.parallel.layouts import local_runs
from pallas_kernels.attention_ranges import Pairs

TOKENS, TILE = 2**13, 512  # of one device, of a tile


def executed(mask: Mask, layout: str, P: int) -> np.ndarray:
    """Tiles that each device executes over all steps of a ring."""
    length = TOKENS * P

    def tiles(place, distance):
        source = (place - distance) % P
        q, k = (Tiling.of(local_runs(layout, length, P, at), TILE, 128) for at in (place, source))
        return Pairs(mask, q, k, Segments(None, None)).over_keys().tiles().sum()

    everywhere = jax.vmap(jax.vmap(tiles, (None, 0)), (0, None))
    return np.asarray(jax.jit(everywhere)(jnp.arange(P), jnp.arange(P))).sum(1)


def imbalance(tiles: np.ndarray) -> float:
    """The busiest device over the mean."""
    return tiles.max() / tiles.mean()


@pytest.mark.parametrize("P", [8, 64])
def test_causal_in_zigzag_order(P):
    tiles = executed(Mask(), "zigzag", P)
    assert imbalance(tiles) <= 1.01
    length = TOKENS * P
    assert tiles.sum() * TILE**2 <= 1.03 * length * (length + 1) / 2
    assert imbalance(executed(Mask(), "contiguous", P)) > 1.5  # what the order is for


@pytest.mark.parametrize("P", [8, 64])
def test_a_window_in_contiguous_order(P):
    assert imbalance(executed(Mask(window=(4095, 0)), "contiguous", P)) <= 1.05
