"""Two tasks whose answer was seen long ago, trained on rows of 256 tokens, and four mixers: `<task>-<mixer>`.

    python -m lcx.train --config experiments/induction/config.py:induction-mamba --workdir runs/induction/induction-mamba
    python -m lcx.evaluate --workdir runs/induction/induction-mamba --config.sequence.length=16384

Tasks: `induction` (the token that followed the special one) and `selective_copy` (8 tokens among filler, in their order).
Mixers: `mamba`, `mamba2`, and attention to all tokens before, `rope` and `alibi` by its position encoding.
"""

from configs import base
from lcx.registry import unknown

TASKS = ("induction", "selective_copy")
MIXERS = {"mamba": "mamba", "mamba2": "mamba2", "rope": "blockwise", "alibi": "blockwise"}
VARIANTS = tuple(f"{task}-{mixer}" for task in TASKS for mixer in MIXERS)


def get_config(variant):
    """One mixer on one task."""
    if variant not in VARIANTS:
        raise unknown("--config=experiments/induction/config.py: variant", variant, VARIANTS)
    task, name = variant.split("-")
    config = base.get_config()
    config.name = f"induction_{task}_{name}"
    config.pattern = (MIXERS[name],)
    config.posenc = name if name in ("rope", "alibi") else "none"
    config.ffn = "none"
    config.sequence.length = 256
    config.mesh.update(data=2, seq=1)
    config.model.update(layers=2, dim=32, heads=4, dtype="float32")
    config.mixers.mamba.state = 8
    config.mixers.mamba2.update(head_dim=16, state=8)
    config.data.source = task
    # With the special token anywhere, 250 of 256 rows want a token from among many, and at a rate of 3e-3 nothing was learned in
    # 3,000 steps. Distances of every order of magnitude teach the same in a few hundred.
    config.datasets.induction.update(distance="log", held_out_rows=256)
    config.datasets.selective_copy.update(num_tokens=8, held_out_rows=256)
    steps, batch = (4000, 8) if task == "induction" else (6000, 16)
    config.train.update(steps=steps, batch=batch, log_every=200)
    rate = 1e-2 if variant == "induction-mamba" else 3e-3
    config.optimizer.update(learning_rate=rate, schedule="constant", warmup_steps=50, weight_decay=0.0)
    config.evaluate.update(every=500, batches=32, buckets=1)
    config.checkpoint.every = 0
    config.track.wandb = "disabled"
    return config
