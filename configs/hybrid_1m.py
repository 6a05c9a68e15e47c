"""Mamba with attention between on sequences of 1,048,576 tokens: three recurrences, then windowed or full ring attention.

    python -m lcx.train --config configs/hybrid_1m.py

Real experiment: 64 devices and more (16K tokens or fewer each). Full attention stands in zigzag order, the recurrences and the
windowed layers in contiguous order; hidden states are converted where the two meet.
Rehearsal (a host without accelerators): true sequences of 1,048,576 tokens on 2 virtual devices, a few steps of a small model,
with a window of 1,024 on its attention: 4 steps in 3 minutes 18 seconds and 9.4 GiB on two x86 cores; the loss falls from 6.03 to
3.71 nats per byte at the fourth, 3.86 on held-out text. Full attention at this length takes hours a layer there, so it is not
rehearsed.
"""

from configs import one_billion


def get_config():
    """1,048,576 tokens a sequence; of 16 layers, 12 recurrences, 3 windowed and 1 full attention."""
    config = one_billion.get_config()
    config.name = "hybrid_1m"
    config.sequence.length = 1_048_576
    with config.unlocked():
        config.layers.local = dict(mixer="ring", window=4096)
        config.layers.wide = dict(mixer="ring")
    config.pattern = ("mamba", "mamba", "mamba", "local") * 3 + ("mamba", "mamba", "mamba", "wide")
    with config.unlocked():
        config.rehearsal = {
            "pattern": ("mamba", "local"),
            "mesh": {"seq": 2},
            "sequence": {"layout": "zigzag"},  # so that hidden states are converted, as in front of full attention
            "layers": {"local": {"window": 1024}},
            "model": {"layers": 2, "dim": 32, "heads": 2, "kv_heads": 2, "head_dim": 16, "dtype": "float32"},
            "ffns": {"gated": {"width": 64}},
            "mixers": {"mamba": {"state": 8}},
            "train": {"steps": 4, "batch": 1, "log_every": 1},
            "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2},
            "checkpoint": {"every": 2},
            "evaluate": {"every": 0, "batches": 1},
        }
    return config
