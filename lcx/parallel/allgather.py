"""All-gather attention: every device gathers all keys and values and attends with its own queries.

One large transfer each way instead of P - 1 hops, at the price of memory linear in the whole row; for short rows, or few
key/value heads. Keys are gathered in their own dtype, again in the backward pass, and gradients are summed in fp32.
Source: Llama Team, "The Llama 3 Herd of Models" (arXiv 2407.21783), section 3.3.2.
"""

import jax
from jax import lax

from lcx.ops.types import contiguous
from lcx.parallel.layouts import contiguous_to_gathered, gathered_to_contiguous, local_runs
from lcx.parallel.plan import Keys, Plan, Queries, block_backward, block_forward


def settled(plan: Plan) -> Plan:
    """There is nothing to decide."""
    return plan


def refuse(plan: Plan) -> str | None:
    """Serves everything."""
    return None


def _gather(plan: Plan, keys: Keys) -> Keys:
    whole = lambda x: gathered_to_contiguous(lax.all_gather(x, "seq", axis=1, tiled=True), plan.layout, plan.shards)
    return jax.tree.map(whole, keys)


def _queries(plan: Plan, q, tokens, slopes, *rows) -> Queries:
    order = local_runs(plan.layout, plan.length, plan.shards, lax.axis_index("seq"))
    return Queries(q, order, tokens, slopes, *rows)


def forward(plan: Plan, q_BsHK, k_BtGK, v_BtGK, tokens_Bs, slopes_H):
    """See `lcx.parallel`."""
    keys_T = _gather(plan, Keys(k_BtGK, v_BtGK, tokens_Bs))
    return block_forward(plan, _queries(plan, q_BsHK, tokens_Bs, slopes_H), keys_T, contiguous(plan.length))


def backward(plan: Plan, q_BsHK, k_BtGK, v_BtGK, do_BsHK, lse_BHs, delta_BHs, tokens_Bs, slopes_H):
    """See `lcx.parallel`."""
    keys_T = _gather(plan, Keys(k_BtGK, v_BtGK, tokens_Bs))
    queries = _queries(plan, q_BsHK, tokens_Bs, slopes_H, do_BsHK, lse_BHs, delta_BHs)
    dq, dkv_T = block_backward(plan, queries, keys_T, contiguous(plan.length))

    def share(dx_BTGK):
        dx_BTGK = contiguous_to_gathered(dx_BTGK, plan.layout, plan.shards)
        return lax.psum_scatter(dx_BTGK, "seq", scatter_dimension=1, tiled=True)

    return dq, *jax.tree.map(share, dkv_T)
