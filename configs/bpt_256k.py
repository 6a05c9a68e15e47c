"""Blockwise Parallel Transformer on sequences of 262,144 tokens: attention and feed-forward of a chunk in one loop.

    python -m lcx.train --config configs/bpt_256k.py

Real experiment: one accelerator, or 2, 4 or 8 with heads and feed-forward width over `tensor`. The training step compiled for
four chips of v5p takes 30 of 95.7 GiB a chip at the peak (libtpu 0.0.48.1; compiled, not run); on other devices whether the
memory suffices is said when it compiles, before anything is allocated.
Rehearsal (a host without accelerators): 4,096 tokens on one virtual device, two and a half minutes on two cores; the held-out
loss ends below 3.0 nats per byte.
"""

from configs import one_billion


def get_config():
    """262,144 tokens a sequence, whole on every device."""
    config = one_billion.get_config()
    config.name = "bpt_256k"
    config.pattern = ("blockwise",)
    config.mesh.update(seq=1, tensor=-1)
    config.sequence.length = 262_144
    config.block.update(token_chunk=2048, fuse_attention=True)
    with config.unlocked():
        config.rehearsal = {
            "mesh": {"tensor": 1},
            "sequence": {"length": 4096},
            "model": {"layers": 2, "dim": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "dtype": "float32"},
            "ffns": {"gated": {"width": 256}},
            "block": {"token_chunk": 1024},
            "train": {"steps": 100, "batch": 1},
            "optimizer": {"learning_rate": 1e-2, "warmup_steps": 10},
            "checkpoint": {"every": 50},
            "evaluate": {"every": 50, "batches": 4},
        }
    return config
