"""Ulysses within groups of neighbouring devices, a ring between the groups.

Inside a group an all-to-all trades tokens for heads, so that a group is one place of the ring with U times the tokens: U times
fewer hops, and U can be as small as the heads require. One group is Ulysses, groups of one device are a ring.
Source: Fang and Zhao, "USP" (arXiv 2405.07719).
"""

import dataclasses

import jax.numpy as jnp

from lcx.parallel import ring
from lcx.parallel.heads import HeadExchange, heads_fit
from lcx.parallel.plan import Plan


def divisors(n: int) -> list[int]:
    """The divisors of n, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


def settled(plan: Plan) -> Plan:
    """The plan with its degree decided, from all heads."""
    return dataclasses.replace(plan, ulysses_degree=group_size(plan))


def refuse(plan: Plan) -> str | None:
    """Refuses a `ulysses_degree` that devices or heads do not allow, and striped or cyclic groups that are not the whole row."""
    degree = group_size(plan)
    if plan.layout in ("striped", "cyclic") and 1 < degree < plan.shards:
        return f"layout={plan.layout!r} leaves groups of {degree} devices no evenly spaced tokens; zigzag and contiguous work"
    return refuse_degree(plan, degree)


def refuse_degree(plan: Plan, degree: int) -> str | None:
    """Why groups of `degree` devices cannot be formed, or None."""
    valid = [d for d in divisors(plan.shards) if heads_fit(plan.q_heads, plan.kv_heads, d)]
    if degree in valid:
        return None
    heads = f"H={plan.q_heads} query and G={plan.kv_heads} key/value heads per tensor shard"
    return (
        f"groups of {degree} devices on seq={plan.shards} cannot split {heads}: H must divide by the group, and G by the group "
        f"or the group by G (groups that can: {', '.join(map(str, valid))})"
    )


def group_size(plan: Plan) -> int:
    """`ulysses_degree`, or the largest divisor of the devices that the heads allow: fewest hops, longest blocks."""
    if plan.ulysses_degree is not None:
        return plan.ulysses_degree
    return max(d for d in divisors(plan.shards) if heads_fit(plan.q_heads, plan.kv_heads, d))


def _groups(plan: Plan) -> tuple[HeadExchange, Plan]:
    """The exchange inside a group, and the plan of the ring between groups."""
    degree = group_size(plan)
    exchange = HeadExchange(plan.shards, degree, plan.kv_heads, plan.layout)
    places = plan.shards // degree
    # One group is the whole row, and its tokens come out in order.
    layout = "contiguous" if places == 1 else plan.layout
    return exchange, dataclasses.replace(
        plan, shards=places, layout=layout, q_heads=plan.q_heads // degree, kv_heads=max(1, plan.kv_heads // degree)
    )


def forward(plan: Plan, q_BsHK, k_BtGK, v_BtGK, tokens_Bs, slopes_H):
    """See `lcx.parallel`."""
    exchange, between = _groups(plan)
    q, k, v, tokens, slopes = _gather(exchange, q_BsHK, k_BtGK, v_BtGK, tokens_Bs, slopes_H)
    o, lse = ring.forward(between, q, k, v, tokens, slopes, stride=exchange.degree)
    return exchange.return_queries(o.astype(plan.dtype)), exchange.return_lse(lse)


def _gather(exchange: HeadExchange, q, k, v, tokens, slopes):
    tokens = None if tokens is None else exchange.gather_tokens(tokens)
    slopes = None if slopes is None else exchange.own_heads(slopes)
    return exchange.gather_queries(q), exchange.gather_keys(k), exchange.gather_keys(v), tokens, slopes


def backward(plan: Plan, q_BsHK, k_BtGK, v_BtGK, do_BsHK, lse_BHs, delta_BHs, tokens_Bs, slopes_H):
    """See `lcx.parallel`. Queries, keys and values are traded again rather than kept."""
    exchange, between = _groups(plan)
    q, k, v, tokens, slopes = _gather(exchange, q_BsHK, k_BtGK, v_BtGK, tokens_Bs, slopes_H)
    do = exchange.gather_queries(do_BsHK)
    rows = exchange.gather_queries(jnp.stack([lse_BHs, delta_BHs], axis=1), tokens_dim=3, heads_dim=2)
    dq, dk, dv = ring.backward(between, q, k, v, do, rows[:, 0], rows[:, 1], tokens, slopes, stride=exchange.degree)
    return (
        exchange.return_queries(dq.astype(q.dtype)),
        exchange.return_key_grads(dk, k.dtype),
        exchange.return_key_grads(dv, v.dtype),
    )
