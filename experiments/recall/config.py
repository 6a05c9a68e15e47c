"""Associative recall over 256 tokens, key and query at least 160 tokens apart, on 8 devices of 32 tokens each.

    python -m lcx.train --config experiments/recall/config.py:ring
    python -m lcx.train --config experiments/recall/config.py:window

`ring`: two layers of ring attention over all tokens. `window`: what a device can do with as many keys as it holds itself, a
window of 32, and twice the layers, so that a step costs more FLOPs than one of `ring`; four windows reach back 124 tokens.
"""

from configs import base
from lcx.registry import unknown

VARIANTS = {"ring": (2, None), "window": (4, (31, 0))}


def get_config(variant):
    """One arm of the comparison."""
    if variant not in VARIANTS:
        raise unknown("--config=experiments/recall/config.py: variant", variant, VARIANTS)
    config = base.get_config()
    config.name = f"recall_{variant}"
    config.pattern = ("ring",)
    config.sequence.length = 256
    layers, config.mixers.ring.window = VARIANTS[variant]
    config.model.update(layers=layers, dim=64, heads=8, head_dim=16, dtype="float32")
    config.ffns.gated.width = 128
    # Recall takes a head that finds the previous token and one that compares keys however far away. ALiBi's steepest and
    # flattest slope suit the two from the start, so little is left to learn before the loss falls.
    config.posenc = "alibi"
    config.data.source = "associative_recall"
    # Filler teaches nothing: more pairs in a row of the same length mean more answers to learn from in a step.
    config.datasets.associative_recall.update(num_pairs=8, vocab=32, gap=160, held_out_rows=128)
    config.train.update(steps=300, batch=16, log_every=20)
    config.optimizer.update(name="muon", learning_rate=1e-2, schedule="wsd", warmup_steps=50, weight_decay=0.0)
    config.evaluate.update(every=25, batches=8, buckets=1)
    config.checkpoint.every = 0
    config.track.wandb = "disabled"
    return config
