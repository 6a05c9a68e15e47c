"""What each implementation of attention takes, as a Markdown table: each is asked by its `refuse`.

python -m pallas_kernels.support        # prints the table that README.md shows
"""

import importlib
from typing import Any

import jax.numpy as jnp

from lcx.ops.types import AttentionSpec, Mask
from pallas_kernels import KERNELS

# The device that an implementation is asked for.
DEVICES = {
    "reference": "cpu",
    "chunked": "cpu",
    "mosaic_tpu": "TPU v5p",
    "mosaic_gpu": "NVIDIA H200",
    "cudnn": "NVIDIA H200",
    "tokamax": "NVIDIA H200",
}
B, S, H, K = 1, 4096, 8, 128
TOKENS, ROW = (B, S), ((B, S), jnp.int32)

# Feature -> how the call differs from whole causal attention of bf16: fields of the spec, sizes, dtype, further arguments.
FEATURES: dict[str, dict[str, Any]] = {
    "causal": {},
    "not causal": dict(mask=Mask(causal=False)),
    "grouped queries": dict(G=2),
    **{f"head width {width}": dict(K=width) for width in (64, 80, 96, 128, 256)},
    "bf16": {},
    "fp16": dict(dtype=jnp.float16),
    "fp32": dict(dtype=jnp.float32),
    "a million tokens": dict(S=2**20),
    "fewer queries than keys, causal": dict(S=S // 2, T=S),
    "window to the left": dict(mask=Mask(window=(1024, 0))),
    "window to both sides": dict(mask=Mask(causal=False, window=(1024, 1024))),
    "sink tokens": dict(mask=Mask(window=(1024, 0), sink_tokens=4), sink_BT=(TOKENS, bool)),
    "packed documents, padding": dict(segments_q_BS=ROW, segments_k_BT=ROW),
    "soft-cap": dict(softcap=30.0),
    "ALiBi": dict(alibi_slopes_H=((H,), jnp.float32)),
    "logsumexp, learned sinks, the steps of a ring": dict(whole=False),
    "order as an array": dict(whole=False, order_q=((S,), jnp.int32), order_k=((S,), jnp.int32)),
}


def refusal(implementation: str, feature: str) -> str | None:
    """Why an implementation does not take a feature, on its device; None if it does."""
    asked = dict(mask=Mask(), whole=True, softcap=None, S=S, G=H, K=K, dtype=jnp.bfloat16) | FEATURES[feature]
    length, width, dtype = asked.pop("S"), asked.pop("K"), asked.pop("dtype")
    queries, keys = (B, length, H, width), (B, asked.pop("T", length), asked.pop("G"), width)
    spec = AttentionSpec(asked.pop("mask"), width**-0.5, asked.pop("softcap"), asked.pop("whole"))
    arrays = dict(q=(queries, dtype), k=(keys, dtype), v=(keys, dtype)) | asked
    shapes, dtypes = ({name: x[i] for name, x in arrays.items()} for i in (0, 1))
    module = importlib.import_module(KERNELS["attention"][implementation])
    return module.refuse(spec, shapes, dtypes, DEVICES[implementation])


def table() -> str:
    """Features by implementations."""
    names = list(KERNELS["attention"])
    rows = ["| | " + " | ".join(f"`{name}`" for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    rows += ["| asked for | " + " | ".join(DEVICES[name] for name in names) + " |"]
    for feature in FEATURES:
        answers = ("yes" if refusal(name, feature) is None else "-" for name in names)
        rows.append(f"| {feature} | " + " | ".join(answers) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
