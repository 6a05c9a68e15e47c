"""What goes round a ring, which way and how far: decided before anything travels."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lcx.ops.dispatch import target
from lcx.ops.types import Runs
from lcx.parallel import sinks
from lcx.parallel.hops import Leg, Ring, needed_distances, shortest_legs
from lcx.parallel.layouts import local_runs
from lcx.parallel.plan import Keys, Plan, Queries

# Tokens of a device times query heads to a key/value head, up to which a hop's transfer can take longer than what is computed
# meanwhile: 4 (tokens)^2 H K / 2 operations over 4 tokens G K bytes, where a TPU does 4,000 (v5e) to 9,000 (v6e) operations in
# the time of a byte over one link; the backward pass is alike. Doubled, because not every kernel reaches the peak.
BOTH_WAYS_UP_TO = 2**14


@dataclasses.dataclass(frozen=True)
class Stream:
    """Some of the heads, and which way round their blocks go: +1 or -1."""

    queries: Queries
    own: Keys
    way: int


@dataclasses.dataclass(frozen=True)
class Route:
    """Where blocks travel.

    Attributes:
      ring: the places.
      plan: for the blocks that travel.
      sinks: for the sink keys where every place fetches them on their own, instead of full hops; else None.
      legs: which way and how far.
    """

    ring: Ring
    plan: Plan
    sinks: Plan | None
    legs: tuple[Leg, ...]

    @classmethod
    def of(cls, plan: Plan, stride: int) -> "Route":
        """The shortest route. With packed documents any block may hold sink keys, and all of them come by."""
        size, ring = plan.shards, Ring(plan.shards, stride)
        legs = tuple(shortest_legs(needed_distances(plan.spec.mask, plan.layout, plan.length, size), size))
        if not plan.has_sinks or sum(hops for _, hops in legs) == size - 1:
            return cls(ring, plan, None, legs)
        if sinks.can_stand_apart(plan):
            return cls(ring, *sinks.split(plan), legs)
        return cls(ring, plan, None, ((1, size - 1),))

    def order(self, distance: int | jax.Array) -> Runs:
        """Where the tokens stand in the row that started `distance` places behind this one."""
        place = (self.ring.place() - distance) % self.plan.shards
        return local_runs(self.plan.layout, self.plan.length, self.plan.shards, place)

    def streams(self, queries: Queries, own: Keys) -> list[Stream]:
        """All heads one way round; or half of them each way, where that shortens a transfer which could be the longer part.

        A link of a TPU carries as much in each direction at once. Between GPUs a switch makes no difference between directions.
        """
        # One value: document ids are alike for all heads, and by themselves their first transfer would be moved in front of the
        # loop over heads (`passes`), where nothing is computed meanwhile.
        own, tokens_Bs = lax.optimization_barrier((own, queries.tokens_Bs))
        queries = queries._replace(tokens_Bs=tokens_Bs)
        (_, s, H, _), G = queries.q_BsHK.shape, own.k_BtGK.shape[2]
        circle = self.legs == ((1, self.plan.shards - 1),) and self.plan.shards > 2
        if not circle or G % 2 or not both_ways(s * H // G):
            return [Stream(queries, own, 1)]
        return [Stream(queries.heads(part, 2), own.heads(part, 2), way) for part, way in ((0, 1), (1, -1))]


def both_ways(tokens_times_group: int) -> bool:
    """Whether links carry both ways at once, and a transfer may be what takes longest; see `BOTH_WAYS_UP_TO`."""
    return target()[0] == "tpu" and tokens_times_group <= BOTH_WAYS_UP_TO


def queries_travel(queries: Queries, own: Keys) -> bool:
    """Whether queries with what the backward pass knows of them are fewer bytes than keys and values, fp32 gradients included."""
    size = lambda *arrays: sum(x.size * x.dtype.itemsize for x in arrays)
    with_gradient = lambda *arrays: size(*arrays) + sum(4 * x.size for x in arrays)
    rows = size(queries.do_BsHK, queries.lse_BHs, queries.delta_BHs)
    return with_gradient(queries.q_BsHK) + rows < with_gradient(own.k_BtGK, own.v_BtGK)


def moves(streams: list[Stream], blocks: Sequence[Any], distance: int) -> list[tuple[Any, int]]:
    """The transfers that hand every stream's block on, for `Ring.during`."""
    return [(block, stream.way * distance) for stream, block in zip(streams, blocks, strict=True)]


def together(parts: Sequence[jax.Array], dim: int) -> jax.Array:
    """The heads of all streams."""
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=dim)
