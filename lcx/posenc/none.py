"""No position encoding: order enters through the causal mask alone (NoPE, arXiv 2305.19466)."""

import dataclasses

import jax


class NoPosition:
    """Leaves queries and keys as they are."""

    @dataclasses.dataclass(frozen=True)
    class Config:
        """Nothing to choose."""

    def __init__(self, config: Config, head_width: int):
        del config, head_width

    def rotate(self, x_BSHK: jax.Array, positions_BS: jax.Array) -> jax.Array:
        """x itself."""
        del positions_BS
        return x_BSHK

    def slopes(self, heads: int) -> None:
        """No bias."""
        del heads
