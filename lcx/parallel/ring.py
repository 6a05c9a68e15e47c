"""Ring Attention: queries stay, keys and values go round, and every transfer is under way while a block is computed.

Each device starts with its own block of keys and hands it on, P - 1 times at most; partial results merge in fp32. The
backward pass is a second ring under the global logsumexp: keys and values go round once more, and the gradient of a block
follows one hop behind it, so that its transfer too hides behind a computation; where queries are fewer bytes, they go round
instead and keys stay. With a window only the blocks that some query sees come by. What travels and which way is decided in
`route`. The program's size does not depend on P.

Sources: Liu, Zaharia, Abbeel, "Ring Attention with Blockwise Transformers" (arXiv 2310.01889); Brandon et al., "Striped
Attention" (arXiv 2311.09431). The local gradient that is added last, the two-way legs for windows, and half of the heads each
way round are ours.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lcx.ops.varying import alike
from lcx.parallel import sinks
from lcx.parallel.hops import Ring
from lcx.parallel.plan import Keys, Plan, Queries, block_backward, block_forward
from lcx.parallel.route import Route, Stream, moves, queries_travel, together


def settled(plan: Plan) -> Plan:
    """There is nothing to decide."""
    return plan


def refuse(plan: Plan) -> str | None:
    """Serves everything."""
    return None


def forward(plan: Plan, q_BsHK, k_BtGK, v_BtGK, tokens_Bs, slopes_H, *, stride: int = 1):
    """See `lcx.parallel`. `stride`: how many devices stand on one place of the ring; `plan.shards` counts places."""
    route = Route.of(plan, stride)
    streams = route.streams(Queries(q_BsHK, route.order(0), tokens_Bs, slopes_H), Keys(k_BtGK, v_BtGK, tokens_Bs))
    found = _forward(route, streams, plan.spec.mask.sink_tokens)
    return together([o for o, _ in found], 2), together([lse for _, lse in found], 1)


def _forward(route: Route, streams: list[Stream], sink_tokens: int) -> list[tuple[jax.Array, jax.Array]]:
    def visit(partials, blocks, distance):
        order = lambda stream: route.order(stream.way * distance)
        each = zip(streams, blocks, partials, strict=True)
        return [block_forward(route.plan, one.queries, block, order(one), partial) for one, block, partial in each]

    partials: list = [None] * len(streams)
    if route.sinks is not None:
        fetched = [sinks.fetch(one.own, sink_tokens, route.ring) for one in streams]
        partials = [block_forward(route.sinks, one.queries, *sink) for one, sink in zip(streams, fetched, strict=True)]
    elif route.legs:
        partials = [_nothing_seen(one.queries.q_BsHK) for one in streams]

    own = [one.own for one in streams]
    blocks, distance = own, 0
    for number, (sign, hops) in enumerate(route.legs):
        if number:  # this leg sets out while the last block of the one before is computed
            last = functools.partial(visit, partials, blocks, distance)
            partials, *blocks = route.ring.during(last, *moves(streams, own, sign))
            distance, hops = sign, hops - 1
        partials, blocks = _travel(route.ring, streams, visit, (partials, blocks), distance, sign, hops)
        distance += sign * hops
    return visit(partials, blocks, distance)


def _nothing_seen(q_BsHK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The partial over no key."""
    B, s, H, _ = q_BsHK.shape
    return alike((jnp.zeros(q_BsHK.shape, jnp.float32), jnp.full((B, H, s), -jnp.inf, jnp.float32)), q_BsHK)


def _travel(ring: Ring, streams: list[Stream], visit: Callable, state: tuple, distance: int, sign: int, hops: int) -> tuple:
    """Computes `hops` blocks, the first at `distance`, while each is handed on; returns the next block uncomputed."""

    def step(t, state):
        partials, blocks = state
        partials, *blocks = ring.during(lambda: visit(partials, blocks, distance + sign * t), *moves(streams, blocks, sign))
        return partials, blocks

    return lax.fori_loop(0, hops, step, state) if hops else state


def backward(plan: Plan, q_BsHK, k_BtGK, v_BtGK, do_BsHK, lse_BHs, delta_BHs, tokens_Bs, slopes_H, *, stride: int = 1):
    """See `lcx.parallel`, and `forward`."""
    route = Route.of(plan, stride)
    queries = Queries(q_BsHK, route.order(0), tokens_Bs, slopes_H, do_BsHK, lse_BHs, delta_BHs)
    own = Keys(k_BtGK, v_BtGK, tokens_Bs)
    if route.legs:
        found = _backward(route, route.streams(queries, own))
        dq, dk, dv = (together(parts, 2) for parts in zip(*((dq, *dkv) for dq, dkv in found), strict=True))
    else:
        dq, (dk, dv) = block_backward(route.plan, queries, own, route.order(0))
    dkv = dk, dv
    if route.sinks is not None:
        keys, order = sinks.fetch(own, plan.spec.mask.sink_tokens, route.ring)
        dq_sinks, dkv_sinks = block_backward(route.sinks, queries, keys, order)
        dq, dkv = dq + dq_sinks, sinks.give_back(dkv_sinks, dkv, route.ring)
    return dq, *dkv


# (of the queries, of keys and values), fp32.
Gradients = tuple[jax.Array, tuple[jax.Array, jax.Array]]


class KeysTravel:
    """Backward: keys and values go round with their gradients, queries stay."""

    way, stays, travels = 1, 0, 1  # and which of the `Gradients`

    def __init__(self, route: Route, streams: list[Stream]):
        self.route, self.streams = route, streams
        self.home = [one.own for one in streams]

    def visit(self, blocks: Sequence[Any], distance: int | jax.Array) -> list[Gradients]:
        """What the blocks that started `distance` places behind contribute, by stream."""
        each = zip(self.streams, blocks, strict=True)
        return [block_backward(self.route.plan, one.queries, block, self.route.order(one.way * distance)) for one, block in each]


class QueriesTravel:
    """Backward: queries go round with what is known of them and their gradient, keys and values stay."""

    way, stays, travels = -1, 1, 0

    def __init__(self, route: Route, streams: list[Stream]):
        self.route, self.streams = route, streams
        self.home = [one.queries.packed() for one in streams]

    def visit(self, blocks: Sequence[Any], distance: int | jax.Array) -> list[Gradients]:
        """See `KeysTravel.visit`."""
        plan, found = self.route.plan, []
        for one, block in zip(self.streams, blocks, strict=True):
            queries = one.queries.unpacked(block, self.route.order(one.way * distance))
            found.append(block_backward(plan, queries, one.own, self.route.order(0)))
        return found


def _backward(route: Route, streams: list[Stream]) -> list[Gradients]:
    """By stream.

    The first transfer and the last, of gradients that come home, have only the own block to hide behind: half of the queries
    each.
    """
    ring = route.ring
    travellers = (QueriesTravel if queries_travel(streams[0].queries, streams[0].own) else KeysTravel)(route, streams)
    legs = [(travellers.way * sign, hops) for sign, hops in route.legs]
    early, *blocks = ring.during(lambda: _own_blocks(route, streams, 0), *moves(streams, travellers.home, legs[0][0]))
    stay, travelled, from_legs = _of(early, travellers.stays), _of(early, travellers.travels), []
    for number, (sign, hops) in enumerate(legs):
        next_leg = [move for following, _ in legs[number + 1 :] for move in moves(streams, travellers.home, following)]
        stay, gradients, blocks = _travel_back(ring, travellers, stay, blocks, sign, hops, next_leg)
        from_legs.append(gradients)
    # Not before the legs are done: the compiler would hide another transfer behind it.
    own, from_legs = lax.optimization_barrier(([one.own for one in streams], from_legs))
    streams = [dataclasses.replace(one, own=keys) for one, keys in zip(streams, own, strict=True)]
    way_home = [
        move for gradients, (sign, hops) in zip(from_legs, legs, strict=True) for move in moves(streams, gradients, -sign * hops)
    ]
    late, *home = ring.during(lambda: _own_blocks(route, streams, 1), *way_home)
    stay = _add(stay, _of(late, travellers.stays))
    by_leg = [home[n : n + len(streams)] for n in range(0, len(home), len(streams))]
    travelled = _add(travelled, _of(late, travellers.travels), *by_leg)
    pairs = (stay, travelled) if travellers.stays == 0 else (travelled, stay)
    return list(zip(*pairs, strict=True))


def _of(gradients: list[Gradients], which: int) -> list:
    """One side of the gradients of every stream."""
    return [pair[which] for pair in gradients]


def _add(*trees: Any) -> Any:
    return jax.tree.map(lambda *parts: sum(parts), *trees)


def _own_blocks(route: Route, streams: list[Stream], half: int) -> list[Gradients]:
    """The gradients of the own blocks from one half of their queries; from all of them in the second half if there is but one."""
    found = []
    for one in streams:
        tokens = one.queries.q_BsHK.shape[1]
        if tokens == 1 and half == 0:
            zeros = lambda x: alike(jnp.zeros(x.shape, jnp.float32), x)
            found.append((zeros(one.queries.q_BsHK), (zeros(one.own.k_BtGK), zeros(one.own.v_BtGK))))
            continue
        queries = one.queries if tokens == 1 else one.queries.halves()[half]
        dq, dkv = block_backward(route.plan, queries, one.own, route.order(0))
        rest = tokens - dq.shape[1]
        found.append((jnp.pad(dq, [(0, 0), (rest, 0) if half else (0, rest), (0, 0), (0, 0)]), dkv))
    return found


def _travel_back(
    ring: Ring, travellers: KeysTravel | QueriesTravel, stay: list, blocks: list, sign: int, hops: int, next_leg: list
):
    """One leg of the backward ring.

    Args:
      travellers: what goes round.
      stay: gradients, so far, of what stays.
      blocks: at distance `sign`.
      next_leg: the transfers that start the next leg, to be made during the last blocks of this one.

    Returns:
      stay; the gradients of the blocks that are here at the end, summed over all places they came past; the next leg's first
      blocks.
    """
    streams = travellers.streams

    def visit(blocks, distance):
        gradients = travellers.visit(blocks, distance)
        return _of(gradients, travellers.stays), _of(gradients, travellers.travels)

    if hops == 1:
        (stay_block, travelled), *arrived = ring.during(lambda: visit(blocks, sign), *next_leg)
        return _add(stay, stay_block), travelled, arrived

    (stay_block, travelled), *blocks = ring.during(lambda: visit(blocks, sign), *moves(streams, blocks, sign))

    def step(t, state):
        stay, travelled, blocks = state
        handed_on = *moves(streams, blocks, sign), *moves(streams, travelled, sign)
        (stay_block, travelled_block), *arrived = ring.during(lambda: visit(blocks, sign * t), *handed_on)
        blocks, travelled = arrived[: len(streams)], arrived[len(streams) :]
        return _add(stay, stay_block), _add(travelled, travelled_block), blocks

    state = _add(stay, stay_block), travelled, blocks
    stay, travelled, blocks = lax.fori_loop(2, hops, step, state) if hops > 2 else state
    (stay_block, last), *arrived = ring.during(lambda: visit(blocks, sign * hops), *moves(streams, travelled, sign), *next_leg)
    travelled, arrived = arrived[: len(streams)], arrived[len(streams) :]
    return _add(stay, stay_block), _add(travelled, last), arrived
