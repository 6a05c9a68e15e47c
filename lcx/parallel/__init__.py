"""The operations of `lcx.ops` over a mesh: attention, layouts, state passing, the vocabulary-sharded loss.

The modules are the interface, as in `lcx.ops`: `from lcx.parallel.attention import context_attention`,
`from lcx.parallel.layouts import convert`. A strategy of `context_attention` is a module of four functions:

    settled(plan) -> the plan with what the strategy decides by itself, from all heads of a device
    refuse(plan) -> why it cannot serve this plan, or None
    forward(plan, q_BsHK, k_BtGK, v_BtGK, tokens_Bs, slopes_H) -> o_BsHK, lse_BHs; fp32, or o in `plan.dtype`
    backward(plan, q_BsHK, k_BtGK, v_BtGK, do_BsHK, lse_BHs, delta_BHs, tokens_Bs, slopes_H) -> dq_BsHK, dk_BtGK, dv_BtGK

on local slices, inside `lcx.sharding.per_shard`; `plan` is a `lcx.parallel.plan.Plan`. They are tried in this order when
the chosen one refuses and an error message names one that does not.
"""

STRATEGIES = {
    "ring": "lcx.parallel.ring",
    "ulysses": "lcx.parallel.ulysses",
    "ulysses_ring": "lcx.parallel.ulysses_ring",
    "allgather": "lcx.parallel.allgather",
}
