"""LongNet on sequences of 1,048,576 tokens: dilated attention of linear cost, every device on the sequence.

    python -m lcx.train --config configs/longnet_1m.py

Real experiment: 8 devices and more (131K tokens or fewer each).
Rehearsal (a host without accelerators): true sequences of 1,048,576 tokens on 2 virtual devices, 6 steps of a
small model: about 4 minutes and 4.5 GiB on two cores; the held-out loss falls from 5.5 to 3.80 nats per byte.
"""

from configs import one_billion


def get_config():
    """1,048,576 tokens a sequence."""
    config = one_billion.get_config()
    config.name = "longnet_1m"
    config.pattern = ("longnet",)
    config.sequence.length = 1_048_576
    config.mixers.longnet.segments = (2048, 8192, 32768, 131072, 1048576)
    config.mixers.longnet.dilations = (1, 4, 16, 64, 512)
    with config.unlocked():
        config.rehearsal = {
            "mesh": {"seq": 2},
            "model": {"layers": 2, "dim": 32, "heads": 2, "kv_heads": 2, "head_dim": 16, "dtype": "float32"},
            "ffns": {"gated": {"width": 64}},
            "mixers": {"longnet": {"segments": (256, 16384, 1048576), "dilations": (1, 64, 4096)}},
            "train": {"steps": 6, "batch": 1, "log_every": 1},
            "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2},
            "checkpoint": {"every": 2},
            "evaluate": {"every": 0, "batches": 1},
        }
    return config
