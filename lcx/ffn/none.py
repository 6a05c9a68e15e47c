"""No feed-forward: layers that are a mixer and nothing else, as Mamba's are."""

import dataclasses
from typing import Any

from flax import nnx

from lcx.dims import Sizes


class NoFeedForward(nnx.Module):
    """The block leaves out the feed-forward, its norm and its residual."""

    @dataclasses.dataclass(frozen=True)
    class Config:
        """No options."""

    def __init__(self, config: Config, sizes: Sizes, *, rngs: nnx.Rngs):
        pass

    @staticmethod
    def inner_width(config: Config, D: int) -> None:
        """There is none."""
        return None

    def weights(self) -> dict[str, Any]:
        """None, by which the block knows."""
        return {}
