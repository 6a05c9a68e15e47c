"""Ring Attention on sequences of 1,048,576 tokens: a 1.0B model with every device on the sequence.

    python -m lcx.train --config configs/ring_1m.py

Real experiment: 64 devices and more (16K tokens or fewer each); zigzag order, keys and values travel the ring.
Rehearsal (a host without accelerators): 2,048 tokens over 8 virtual devices, about two minutes on two cores; the held-out
loss ends below 3.0 nats per byte (byte frequencies alone give 3.15).
"""

from configs import one_billion


def get_config():
    """1,048,576 tokens a sequence."""
    config = one_billion.get_config()
    config.name = "ring_1m"
    config.pattern = ("ring",)
    config.sequence.length = 1_048_576
    with config.unlocked():
        config.rehearsal = {
            "sequence": {"length": 2048},
            "model": {"layers": 2, "dim": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "dtype": "float32"},
            "ffns": {"gated": {"width": 256}},
            "train": {"steps": 150, "batch": 1},
            "optimizer": {"learning_rate": 1e-2, "warmup_steps": 10},
            "checkpoint": {"every": 50},
            "evaluate": {"every": 50, "batches": 8},
        }
    return config
