"""Associative recall over 512 tokens, key and query at least 320 tokens apart, on 8 devices of 64 tokens each.

    python -m lcx.train --config experiments/recall/config.py:ring
    python -m lcx.train --config experiments/recall/config.py:window

`ring`: two layers of ring attention over all tokens. `window`: what a device can do with as many keys as it holds itself, a
window of 64, and twice the layers, so that a step costs at least as many FLOPs; four windows reach back 256 tokens.
"""

from configs import base
from lcx.registry import unknown

VARIANTS = {"ring": (2, None), "window": (4, (63, 0))}


def get_config(variant):
    """One arm of the comparison."""
    if variant not in VARIANTS:
        raise unknown("--config=experiments/recall/config.py: variant", variant, VARIANTS)
    config = base.get_config()
    config.name = f"recall_{variant}"
    config.pattern = ("ring",)
    config.sequence.length = 512
    layers, config.mixers.ring.window = VARIANTS[variant]
    config.model.update(layers=layers, dim=64, heads=2, kv_heads=1, head_dim=32, dtype="float32")
    config.ffns.gated.width = 128
    config.data.source = "associative_recall"
    config.datasets.associative_recall.update(num_pairs=8, vocab=64, gap=320, held_out_rows=128)
    config.train.update(steps=1500, batch=16, log_every=50)
    config.optimizer.update(learning_rate=3e-3, warmup_steps=100, weight_decay=0.0)
    config.evaluate.update(every=100, batches=8, buckets=1)
    config.checkpoint.every = 0
    config.track.wandb = "disabled"
    return config
