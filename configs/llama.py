"""The Llama family at its published sizes, on sequences of 1,048,576 tokens with ring attention.

    python -m lcx.train --config configs/llama.py:8b --config.init_from=DIR --config.data.tokenizer=DIR/tokenizer.json

DIR holds the safetensors, config.json and tokenizer of a published checkpoint; without it training starts from random weights.
Sizes: 1b 3b 7b 8b 13b 30b 70b. Real experiment: a pod slice with 4K to 16K tokens a device (256 devices for 7b).
Rehearsal (a host without accelerators): the same layer plan at toy width, 1,024 tokens over 8 virtual devices, 20 steps in
about a minute on two cores; the held-out loss ends below 4.0 nats per byte (from 5.5, an even guess).
"""

from configs import base
from lcx.registry import unknown

# layers, dim, heads, kv_heads, head_dim, ffn width, vocabulary, tied, rope theta, llama3 scaling factor (0: none)
SIZES = {
    "1b": (16, 2048, 32, 8, 64, 8192, 128_256, True, 5e5, 32),
    "3b": (28, 3072, 24, 8, 128, 8192, 128_256, True, 5e5, 32),
    "7b": (32, 4096, 32, 32, 128, 11_008, 32_000, False, 1e4, 0),
    "8b": (32, 4096, 32, 8, 128, 14_336, 128_256, False, 5e5, 8),
    "13b": (40, 5120, 40, 40, 128, 13_824, 32_000, False, 1e4, 0),
    "30b": (60, 6656, 52, 52, 128, 17_920, 32_000, False, 1e4, 0),
    "70b": (80, 8192, 64, 8, 128, 28_672, 128_256, False, 5e5, 8),
}


def get_config(size):
    """One member of the family."""
    if size not in SIZES:
        raise unknown("--config=configs/llama.py: size", size, SIZES)
    layers, dim, heads, kv_heads, head_dim, width, vocab, tied, theta, factor = SIZES[size]
    config = base.get_config()
    config.name = f"llama_{size}"
    config.pattern = ("ring",)
    config.sequence.length = 1_048_576
    config.model.update(layers=layers, dim=dim, heads=heads, kv_heads=kv_heads, head_dim=head_dim, vocab=vocab, tied=tied)
    config.ffns.gated.width = width
    config.posencs.rope.theta = theta
    if factor:
        config.posencs.rope.update(scaling="llama3", factor=float(factor))
    config.data.packing = "stream"
    config.train.update(steps=2_000, batch=1)
    config.optimizer.update(learning_rate=2e-5, warmup_steps=20)
    config.checkpoint.every = 100
    config.evaluate.update(every=100, batches=1)
    with config.unlocked():
        config.rehearsal = {
            "sequence": {"length": 1024},
            "model": {
                "layers": 2,
                "dim": 64,
                "heads": 4,
                "kv_heads": max(1, 4 * kv_heads // heads),
                "head_dim": 16,
                "vocab": 256,
            },
            "ffns": {"gated": {"width": 192}},
            "train": {"steps": 20},
            "optimizer": {"learning_rate": 5e-3, "warmup_steps": 5},
        }
        config.rehearsal["model"]["dtype"] = "float32"
    return config
