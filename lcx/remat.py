"""What a layer keeps for its backward pass, by name."""

import jax

from lcx.registry import unknown

ATTENTION_NAMES = ("attention_out", "attention_lse")

POLICIES = {
    "none": jax.checkpoint_policies.everything_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names(*ATTENTION_NAMES),
    "minimal": jax.checkpoint_policies.nothing_saveable,
}
NAMES = ("auto", *POLICIES)


def candidates(name: str) -> tuple[str, ...]:
    """The policies that a run tries until the compiled step fits: for auto, from the fastest to the smallest."""
    return ("attention", "minimal") if name == "auto" else (name,)


def policy(name: str):
    """none: keep everything; attention: layer inputs and the attention output, so that the forward ring is not replayed;
    minimal: layer inputs only; auto: the first of its candidates, unless a run has replaced it by another."""
    if name not in NAMES:
        raise unknown("block.remat", name, NAMES)
    return POLICIES[candidates(name)[0]]
