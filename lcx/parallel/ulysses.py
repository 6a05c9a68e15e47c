"""DeepSpeed Ulysses: trade tokens for heads, attend to the whole row locally, trade back.

Two all-to-alls each way instead of P - 1 hops, but no more devices than the heads allow. Source: arXiv 2309.14509.
"""

import dataclasses

from lcx.parallel import ulysses_ring
from lcx.parallel.plan import Plan


def settled(plan: Plan) -> Plan:
    """All devices are one group."""
    return dataclasses.replace(plan, ulysses_degree=plan.shards)


def refuse(plan: Plan) -> str | None:
    """Refuses head counts that the devices cannot split."""
    return ulysses_ring.refuse(settled(plan))


def forward(plan: Plan, *arrays):
    """See `lcx.parallel`."""
    return ulysses_ring.forward(settled(plan), *arrays)


def backward(plan: Plan, *arrays):
    """See `lcx.parallel`."""
    return ulysses_ring.backward(settled(plan), *arrays)
