"""LongNet on sequences of 1,073,741,824 tokens, in one piece over a slice of a pod.

    python -m lcx.train --config configs/longnet_1b.py

Name a corpus of that many tokens, --config.data.source=...: the default text is 1 % of one row.
Real experiment: 1,024 chips of v5p (v5p:8x8x16, 1,048,576 tokens each), 0.20B parameters. The whole training step needs 89.4 GiB
of a chip's 95.7 at its peak. Compiled, not run (libtpu 0.0.48.1, jax 0.11.2; `make test-slow` compiles it and prints the bytes).
Rehearsal (a host without accelerators): that of `longnet_1m`, 1,048,576 tokens on 2 virtual devices.
"""

from configs import longnet_1m


def get_config():
    """1,073,741,824 tokens a sequence; each branch keeps 2,048 keys a segment and costs an eighth of the one before."""
    config = longnet_1m.get_config()
    config.name = "longnet_1b"
    config.sequence.length = 2**30
    config.model.update(layers=12, dim=1024, heads=8, kv_heads=8, head_dim=128)
    config.ffns.gated.width = 4096
    config.mixers.longnet.segments = (2**11, 2**14, 2**17, 2**20, 2**23, 2**26, 2**30)
    config.mixers.longnet.dilations = (1, 2**3, 2**6, 2**9, 2**12, 2**15, 2**19)
    with config.unlocked():
        config.rehearsal = dict(config.rehearsal, sequence=dict(length=2**20))
    return config
