"""Ring Attention: queries stay, keys and values go round, and every transfer is under way while a block is computed.

Each device starts with its own block of keys and hands it on, P - 1 times at most; partial results merge in fp32. The
backward pass is a second ring under the global logsumexp: keys and values go round once more, and the gradient of a block
follows one hop behind it, so that its transfer too hides behind a computation. With a window only the blocks that some
query sees come by. The program's size does not depend on P.

Sources: Liu, Zaharia, Abbeel, "Ring Attention with Blockwise Transformers" (arXiv 2310.01889); Brandon et al., "Striped
Attention" (arXiv 2311.09431). The local gradient that is added last and the two-way legs for windows are ours.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from lcx.ops.types import Runs
from lcx.parallel import sinks
from lcx.parallel.hops import Leg, Ring, needed_distances, shortest_legs
from lcx.parallel.layouts import local_runs
from lcx.parallel.plan import Keys, Plan, Queries, block_backward, block_forward


def settled(plan: Plan) -> Plan:
    """There is nothing to decide."""
    return plan


def refuse(plan: Plan) -> str | None:
    """Serves everything."""
    return None


def forward(plan: Plan, q_BsHK, k_BtGK, v_BtGK, tokens_Bs, slopes_H, *, stride: int = 1):
    """See `lcx.parallel`. `stride`: how many devices stand on one place of the ring; `plan.shards` counts places."""
    route = Route.of(plan, stride)
    queries = Queries(q_BsHK, route.order(0), tokens_Bs, slopes_H)
    own = _together(Keys(k_BtGK, v_BtGK, tokens_Bs))
    visit = lambda partial, keys, distance: block_forward(route.plan, queries, keys, route.order(distance), partial)

    partial = None
    if route.sinks is not None:
        keys, order = sinks.fetch(own, plan.spec.mask.sink_tokens, route.ring)
        partial = block_forward(route.sinks, queries, keys, order)
    if route.legs and partial is None:
        B, s, H, _ = q_BsHK.shape
        partial = jnp.zeros(q_BsHK.shape, jnp.float32), jnp.full((B, H, s), -jnp.inf, jnp.float32)

    keys, distance = own, 0
    for number, (sign, hops) in enumerate(route.legs):
        if number:  # this leg sets out while the last block of the one before is computed
            partial, keys = route.ring.during(functools.partial(visit, partial, keys, distance), (own, sign))
            distance, hops = sign, hops - 1
        partial, keys = _travel(route.ring, visit, (partial, keys), distance, sign, hops)
        distance += sign * hops
    return visit(partial, keys, distance)


def _together(keys: Keys) -> Keys:
    """The same. Document ids are alike for all heads: by themselves their first transfer would be moved in front of the loop over
    heads (`passes`), where nothing is computed meanwhile.
    """
    return lax.optimization_barrier(keys)


def _travel(ring: Ring, visit: Callable, state: tuple, distance: int, sign: int, hops: int) -> tuple:
    """Computes `hops` blocks, the first at `distance`, while each is handed on; returns the next block uncomputed."""

    def step(t, state):
        partial, keys = state
        return tuple(ring.during(lambda: visit(partial, keys, distance + sign * t), (keys, sign)))

    return lax.fori_loop(0, hops, step, state) if hops else state


def backward(plan: Plan, q_BsHK, k_BtGK, v_BtGK, do_BsHK, lse_BHs, delta_BHs, tokens_Bs, slopes_H, *, stride: int = 1):
    """See `lcx.parallel`, and `forward`.

    The first transfer and the last, of gradients that come home, have only the own block to hide behind: half of the queries
    each.
    """
    route = Route.of(plan, stride)
    ring = route.ring
    queries = Queries(q_BsHK, route.order(0), tokens_Bs, slopes_H, do_BsHK, lse_BHs, delta_BHs)
    own = _together(Keys(k_BtGK, v_BtGK, tokens_Bs))
    visit = lambda keys, distance, some=queries: block_backward(route.plan, some, keys, route.order(distance))

    if route.legs:
        first_way, late, from_legs = route.legs[0][0], queries, []
        if (tokens := q_BsHK.shape[1]) == 1:
            dq, dkv, keys = jnp.zeros(q_BsHK.shape, jnp.float32), (0.0, 0.0), ring.hop(own, first_way)
        else:
            early, late = queries.halves()
            (dq, dkv), keys = ring.during(lambda: visit(own, 0, early), (own, first_way))
            dq = jnp.pad(dq, [(0, 0), (0, tokens - dq.shape[1]), (0, 0), (0, 0)])
        for number, (sign, hops) in enumerate(route.legs):
            next_leg = [(own, following) for following, _ in route.legs[number + 1 :]]
            dq, dkv_leg, keys = _travel_back(ring, visit, dq, keys, sign, hops, next_leg)
            from_legs.append(dkv_leg)
        # Not before the legs are done: the compiler would hide another transfer behind it.
        own, from_legs = lax.optimization_barrier((own, from_legs))
        ways = [-sign * hops for sign, hops in route.legs]
        (dq_late, dkv_late), *home = ring.during(lambda: visit(own, 0, late), *zip(from_legs, ways, strict=True))
        dq = dq + jnp.pad(dq_late, [(0, 0), (tokens - dq_late.shape[1], 0), (0, 0), (0, 0)])
        dkv = jax.tree.map(lambda *parts: sum(parts), dkv, dkv_late, *home)
    else:
        dq, dkv = visit(own, 0)

    if route.sinks is not None:
        keys, order = sinks.fetch(own, plan.spec.mask.sink_tokens, ring)
        dq_sinks, dkv_sinks = block_backward(route.sinks, queries, keys, order)
        dq, dkv = dq + dq_sinks, sinks.give_back(dkv_sinks, dkv, ring)
    return dq, *dkv


def _travel_back(ring: Ring, visit: Callable, dq: jax.Array, keys: Keys, sign: int, hops: int, next_leg: list):
    """One leg of the backward ring.

    Args:
      visit: (keys, distance) -> (dq, (dk, dv)) of one block.
      dq: sum so far.
      keys: the block at distance `sign`.
      next_leg: the transfer that starts the next leg, to be made during the last block of this one; at most one.

    Returns:
      dq; the gradient of the block that is here at the end, summed over all places it came past; the next leg's first keys.
    """
    if hops == 1:
        (dq_block, dkv), *arrived = ring.during(lambda: visit(keys, sign), *next_leg)
        return dq + dq_block, dkv, arrived[0] if arrived else None

    (dq_block, dkv), keys = ring.during(lambda: visit(keys, sign), (keys, sign))

    def step(t, state):
        dq, dkv, keys = state
        (dq_block, dkv_block), keys, dkv = ring.during(lambda: visit(keys, sign * t), (keys, sign), (dkv, sign))
        return dq + dq_block, jax.tree.map(jnp.add, dkv, dkv_block), keys

    state = dq + dq_block, dkv, keys
    dq, dkv, keys = lax.fori_loop(2, hops, step, state) if hops > 2 else state
    (dq_block, dkv_block), dkv, *arrived = ring.during(lambda: visit(keys, sign * hops), (dkv, sign), *next_leg)
    return dq + dq_block, jax.tree.map(jnp.add, dkv, dkv_block), arrived[0] if arrived else None


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
