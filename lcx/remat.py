"""What a layer keeps for its backward pass, by name."""

import jax

from lcx.registry import unknown

# Outputs of attention and of recurrences, with what their backward passes need besides their inputs.
MIXER_NAMES = ("attention_out", "attention_lse", "recurrence_out", "recurrence_states")

POLICIES = {
    "none": jax.checkpoint_policies.everything_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names(*MIXER_NAMES),
    "minimal": jax.checkpoint_policies.nothing_saveable,
}
NAMES = ("auto", *POLICIES)


def candidates(name: str) -> tuple[str, ...]:
    """The policies that a run tries until the compiled step fits: for auto, from the fastest to the smallest."""
    return ("attention", "minimal") if name == "auto" else (name,)


def policy(name: str):
    """A policy of `jax.checkpoint`.

    none keeps everything but what chunks of tokens compute again; attention keeps layer inputs and the output of attention or
    recurrence, so that the forward ring or scan is not replayed; minimal keeps layer inputs only; auto is the first of its
    candidates, unless a run has replaced it by another.
    """
    if name not in NAMES:
        raise unknown("block.remat", name, NAMES)
    return POLICIES[candidates(name)[0]]
