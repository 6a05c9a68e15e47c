"""ALiBi: a bias -slope_h * (i - j) on the scores and no other position signal (arXiv 2108.12409)."""

import dataclasses

import jax
import numpy as np


def alibi_slopes(heads: int) -> np.ndarray:
    """fp32 slopes of `heads` heads: 2^(-8h/H) for a power of two, filled up from the next power otherwise."""
    lower = 2 ** int(np.floor(np.log2(heads)))
    series = lambda count: 2.0 ** (-8.0 * np.arange(1, count + 1) / count)
    return np.concatenate([series(lower), series(2 * lower)[::2][: heads - lower]]).astype(np.float32)


class Alibi:
    """Distances enter inside the attention kernel; queries and keys stay as they are."""

    @dataclasses.dataclass(frozen=True)
    class Config:
        """Nothing to choose."""

    def __init__(self, config: Config, head_width: int):
        del config, head_width

    def rotate(self, x_BSHK: jax.Array, positions_BS: jax.Array) -> jax.Array:
        """x itself."""
        del positions_BS
        return x_BSHK

    def slopes(self, heads: int) -> np.ndarray:
        """fp32 [heads]."""
        return alibi_slopes(heads)
