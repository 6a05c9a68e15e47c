"""Sink tokens over a mesh: the first n tokens of a document, which a window never hides (Xiao et al. 2023, StreamingLLM)."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from lcx.ops.types import contiguous
from lcx.parallel.hops import Ring
from lcx.parallel.layouts import local_convert, local_runs
from lcx.parallel.plan import Keys, Plan
from lcx.sharding import activation_spec, per_shard


def leading_tokens_BS(segments_BS: jax.Array, count: int, *, layout: str, mesh: Mesh) -> jax.Array:
    """bool B S: which tokens are among the first `count` of their document, in linear cost.

    A token is one iff the token `count` places before it is of another document.

    Args:
      segments_BS: int32 document ids, 0 for padding, in `layout` order; a document's tokens are neighbours in the row.
      count: at least 1.
      layout: order of the tokens.
      mesh: the device mesh.
    """
    shards = mesh.shape["seq"]

    def leading(segments_Bs):
        here = local_convert(segments_Bs, layout, "contiguous", shards=shards)
        is_first = (here != 0) & (here != _earlier(here, count, shards))
        return local_convert(is_first, "contiguous", layout, shards=shards)

    spec = activation_spec("BS")
    return per_shard(leading, mesh=mesh, in_specs=spec, out_specs=spec, form="tokenwise")(segments_BS)


def _earlier(x_Bs: jax.Array, distance: int, shards: int) -> jax.Array:
    """For every token of a contiguous layout, the value `distance` tokens before it; 0 before the row."""
    s, pieces, missing = x_Bs.shape[1], [x_Bs], distance
    for back in range(1, shards):
        if missing <= 0:
            break
        # Devices at the front of the row receive from nobody, and ppermute gives them zeros.
        pairs = [(device, device + back) for device in range(shards - back)]
        pieces.insert(0, lax.ppermute(x_Bs[:, -min(missing, s) :], "seq", pairs))
        missing -= s
    behind = jnp.concatenate(pieces, axis=1)
    return jnp.pad(behind, ((0, 0), (max(missing, 0), 0)))[:, :s]


def can_stand_apart(plan: Plan) -> bool:
    """Whether the sink keys are the first tokens that place 0 holds, so that they can be sent round on their own."""
    if not plan.has_sinks or plan.packed or plan.layout == "striped":
        return False
    return plan.spec.mask.sink_tokens <= local_runs(plan.layout, plan.length, plan.shards, 0).length


def split(plan: Plan) -> tuple[Plan, Plan]:
    """(plan for the keys that the window may hide, plan for the sink keys); together they see what `plan` sees."""
    mask = plan.spec.mask
    with_mask = lambda **changes: dataclasses.replace(plan.spec, mask=dataclasses.replace(mask, sink_tokens=0, **changes))
    hidden = dataclasses.replace(plan, spec=with_mask(), hidden=mask.sink_tokens)
    return hidden, dataclasses.replace(plan, spec=with_mask(window=None))


def fetch(own: Keys, count: int, ring: Ring) -> tuple[Keys, object]:
    """The first `count` keys of the row on every place, and where they stand in it."""
    first = jax.tree.map(lambda x: jnp.where(ring.place() == 0, x[:, :count], 0), own)
    return ring.sum(first), contiguous(count)


def give_back(grads: tuple[jax.Array, jax.Array], whole: tuple[jax.Array, jax.Array], ring: Ring):
    """Adds what all places contribute to the gradients (dk, dv) of the first keys to place 0's `whole` ones; fp32."""
    here = ring.place() == 0
    add = lambda part, whole: whole.at[:, : part.shape[1]].add(jnp.where(here, part, 0))
    return jax.tree.map(add, ring.sum(grads), whole)
