"""What a layer keeps for its backward pass, by name."""

import jax

from lcx.registry import unknown

ATTENTION_NAMES = ("attention_out", "attention_lse")

POLICIES = {
    "none": jax.checkpoint_policies.everything_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names(*ATTENTION_NAMES),
    "minimal": jax.checkpoint_policies.nothing_saveable,
}


def policy(name: str):
    """none: keep everything; attention: layer inputs and the attention output, so that the forward ring is not replayed;
    minimal: layer inputs only."""
    if name not in POLICIES:
        raise unknown("block.remat", name, POLICIES)
    return POLICIES[name]
