"""A ring of devices: who is whose neighbour, and which blocks have to come round at all."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax

from lcx.ops.types import Mask
from lcx.parallel.layouts import run_bounds

# A way round the ring: +1 or -1, and how many hops.
Leg = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Ring:
    """`size` places along `seq`, neighbours `stride` devices apart; `stride` such rings run side by side.

    Attributes:
      size: places.
      stride: devices that stand on one place.
    """

    size: int
    stride: int = 1

    def place(self) -> jax.Array:
        """This device's place."""
        return lax.axis_index("seq") // self.stride

    def hop(self, tree: Any, distance: int) -> Any:
        """Every array moved `distance` places on."""
        devices = self.size * self.stride
        pairs = [(device, (device + distance * self.stride) % devices) for device in range(devices)]
        return jax.tree.map(lambda x: lax.ppermute(x, "seq", pairs), tree)

    def during(self, compute: Callable[[], Any], *transfers: tuple[Any, int]) -> list[Any]:
        """[compute(), *moved]: transfers (tree, distance) that are under way while `compute` runs.

        The barrier lets nobody read what has arrived before the computation is done. Without it XLA orders all transfers
        before all computation, or lets each wait for the last; it is the one form that overlapped on every TPU and GPU tried.
        """
        moved = [self.hop(tree, distance) for tree, distance in transfers]
        return list(lax.optimization_barrier((compute(), *moved)))

    def sum(self, tree: Any) -> Any:
        """Every array summed over the places of this device's ring."""
        if self.stride == 1:
            return jax.tree.map(lambda x: lax.psum(x, "seq"), tree)
        # JAX sums over no part of an axis where it checks what differs between devices.
        groups = [[place * self.stride + i for place in range(self.size)] for i in range(self.stride)]
        return jax.tree.map(lambda x: lax.all_gather(x, "seq", axis_index_groups=groups).sum(0, dtype=x.dtype), tree)


@functools.lru_cache(maxsize=1024)
def needed_distances(mask: Mask, layout: str, length: int, size: int) -> list[int]:
    """The distances 1 ... size - 1 at which some place sees, through causality and window, a key of the place behind it."""
    if mask.left is None:  # the last place sees every other
        return list(range(1, size))
    first, last = run_bounds(layout, length, size)
    needed = []
    for distance in range(1, size):
        source = (np.arange(size) - distance) % size
        # A query's order minus a key's takes values between these, for every pair of a query run and a key run.
        least = first[:, :, None] - last[source][:, None, :]
        most = last[:, :, None] - first[source][:, None, :]
        seen = np.ones(least.shape, bool)
        if mask.left is not None:
            seen &= least <= mask.left
        if mask.right is not None:
            seen &= most >= -mask.right
        if seen.any():
            needed.append(distance)
    return needed


def shortest_legs(distances: list[int], size: int) -> list[Leg]:
    """The fewest hops that bring every one of these distances past: some forward and, from home again, some backward."""
    stops = [0, *distances, size]
    gaps = [after - before for before, after in zip(stops, stops[1:], strict=False)]
    widest = int(np.argmax(gaps))
    forward, backward = stops[widest], size - stops[widest + 1]
    if forward + backward == size - 1:  # nothing to skip: one way is simpler
        forward, backward = size - 1, 0
    return [(sign, hops) for sign, hops in ((1, forward), (-1, backward)) if hops]
