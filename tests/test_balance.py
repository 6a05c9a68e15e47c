"""How evenly the steps of a ring share their work: tiles that the kernels execute on every device, from their intervals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.ops.tiling import Tiling
from lcx.ops.types import Mask, Segments
from lcx.parallel.layouts import local_runs, sequence_permutation
from pallas_kernels.attention_ranges import Pairs

TOKENS, TILE = 2**13, 512  # of one device, of a tile


def executed(mask: Mask, layout: str, P: int, ids_S: np.ndarray | None = None) -> np.ndarray:
    """Tiles that each device (first dim) executes in each step of a ring."""
    length = TOKENS * P
    held = None if ids_S is None else jnp.asarray(ids_S[sequence_permutation(layout, length, P)].reshape(P, 1, TOKENS))

    def tiles(place, distance):
        source = (place - distance) % P
        q, k = (Tiling.of(local_runs(layout, length, P, at), TILE, 128) for at in (place, source))
        segments = Segments(None, None) if held is None else Segments(held[place], held[source])
        return Pairs(mask, q, k, segments).over_keys().tiles().sum()

    steps = jax.jit(lambda place: jax.lax.map(lambda distance: tiles(place, distance), jnp.arange(P)))
    return np.stack([np.asarray(steps(place)) for place in range(P)])


def imbalance(tiles: np.ndarray) -> float:
    """The busiest device over the mean."""
    work = tiles.sum(1)
    return work.max() / work.mean()


def longest_chain(tiles: np.ndarray) -> float:
    """Tiles on the longest chain of steps that wait for each other, over the mean of a device: what a ring takes.

    A device starts a step when it has done the last one and the block has come, which its neighbour sent when that had done its
    step before.
    """
    done = np.zeros(len(tiles))
    for step in tiles.T:
        done = np.maximum(done, np.roll(done, 1)) + step
    return done.max() / tiles.sum(1).mean()


def documents(length: int, seed: int) -> np.ndarray:
    """Ids of documents as long as text has them: log-normal, median 2,000 tokens."""
    lengths = np.clip(np.random.default_rng(seed).lognormal(np.log(2000), 1.0, length // 500).astype(int), 16, None)
    return np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths)[:length]


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


@pytest.mark.parametrize(("P", "chain"), [(8, 1.3), (64, 1.7)])
def test_documents_in_cyclic_order(P, chain):
    """Devices differ by up to half, and nobody waits long: in other orders a ring takes far longer. Mean of three rows."""
    rows = [documents(TOKENS * P, seed) for seed in range(3)]
    found = {layout: [executed(Mask(), layout, P, ids) for ids in rows] for layout in ("cyclic", "zigzag", "contiguous")}
    chains = {layout: np.mean([longest_chain(tiles) for tiles in each]) for layout, each in found.items()}
    assert chains["cyclic"] <= chain
    assert chains["cyclic"] <= (0.7 if P == 8 else 0.5) * min(chains["zigzag"], chains["contiguous"])
    assert np.mean([tiles.sum() for tiles in found["cyclic"]]) <= 1.02 * np.mean([tiles.sum() for tiles in found["zigzag"]])


def test_rows_of_one_document_in_cyclic_order():
    """Sixteen blocks of a device: the last device has half a block's row more than the mean in each."""
    assert imbalance(executed(Mask(), "cyclic", 8)) <= 1.07
