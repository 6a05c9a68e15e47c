"""Whole attention by cuDNN, through `jax.nn.dot_product_attention`: NVIDIA GPUs since Ampere.

It keeps its own residuals, so that a remat policy that saves `attention_out` runs its forward pass again. Its backward pass adds
up in any order: a run that goes on after it was killed is not the same to the bit.
"""

import jax

from lcx.ops.attention_whole import unsuitable, window

IMPLEMENTATION = "cudnn"  # tests say "xla": the same arguments mean the same there, on any platform
BEFORE_AMPERE = ("RTX 2060", "RTX 2070", "RTX 2080", "GTX", "TITAN", "Quadro", "T4", "V100", "P100", "K80")
LARGEST_WIDTH = 128
LARGEST_WIDTH_HOPPER = 256
HOPPER_OR_LATER = ("H100", "H200", "GH200", "H800", "H20", "B100", "B200", "GB200", "B300", "GB300")


def refuse(spec, shapes, dtypes, device_kind):
    """NVIDIA GPUs only; whole rows; causal masks and windows to the left; 16-bit operands."""
    if not device_kind.startswith("NVIDIA") or any(name in device_kind for name in BEFORE_AMPERE):
        return f"it is for NVIDIA GPUs since Ampere and this is {device_kind}"
    if reason := unsuitable(spec, shapes, dtypes):
        return reason
    if spec.softcap is not None:
        return "it has no soft-cap"
    causal, sides = window(spec.mask, shapes["k"][1])
    if sides is not None and not causal:
        return f"window={sides}: it takes windows to the left only"
    K = shapes["q"][3]
    largest = LARGEST_WIDTH_HOPPER if any(name in device_kind for name in HOPPER_OR_LATER) else LARGEST_WIDTH
    if K > largest or K % 8:
        return f"head width K={K}; on {device_kind} it takes multiples of 8 up to {largest}"
    return None


def whole(q_BSHK, k_BTGK, v_BTGK, *, spec):
    """See `lcx.ops.attention`, "Backends"."""
    causal, sides = window(spec.mask, k_BTGK.shape[1])
    options = dict(scale=spec.scale, is_causal=causal, local_window_size=sides, implementation=IMPLEMENTATION)
    return jax.nn.dot_product_attention(q_BSHK, k_BTGK, v_BTGK, **options)
