"""Mamba on sequences of 1,048,576 tokens: a selective scan of linear cost, every device on the sequence.

    python -m lcx.train --config configs/mamba_1m.py

Real experiment: 8 devices and more (131K tokens or fewer each).
Rehearsal (a host without accelerators): true sequences of 1,048,576 tokens on 2 virtual devices, 6 steps of one
small layer: about 3 minutes and 6 GiB on two cores; the held-out loss falls from 6.3 to 3.66 nats per byte.
"""

from configs import one_billion


def get_config():
    """1,048,576 tokens a sequence."""
    config = one_billion.get_config()
    config.name = "mamba_1m"
    config.pattern = ("mamba",)
    config.ffn = "none"
    config.sequence.length = 1_048_576
    config.model.update(layers=48)
    with config.unlocked():
        config.rehearsal = {
            "mesh": {"seq": 2},
            "model": {"layers": 1, "dim": 32, "heads": 2, "kv_heads": 2, "head_dim": 16, "dtype": "float32"},
            "mixers": {"mamba": {"state": 8}},
            "train": {"steps": 6, "batch": 1, "log_every": 1},
            "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2},
            "checkpoint": {"every": 2},
            "evaluate": {"every": 0, "batches": 1},
        }
    return config
