"""Whole attention by Tokamax (extra [tokamax]): Pallas kernels for GPU and TPU, a peer to measure against."""

from lcx.ops.attention_whole import unsuitable, window
from lcx.ops.dispatch import target
from lcx.registry import UserError

HEAD_WIDTHS = (64, 128, 256)
# Kernels only: its default goes on to one that holds all scores at once.
IMPLEMENTATIONS = {"NVIDIA": ("mosaic", "triton"), "TPU": ("mosaic",)}


def refuse(spec, shapes, dtypes, device_kind):
    """NVIDIA GPUs and TPUs; whole rows; 16-bit operands."""
    if not device_kind.startswith(tuple(IMPLEMENTATIONS)):
        return f"it is for NVIDIA GPUs and TPUs and this is {device_kind}"
    if reason := unsuitable(spec, shapes, dtypes):
        return reason
    if (K := shapes["q"][3]) not in HEAD_WIDTHS:
        return f"head width K={K}; it takes {', '.join(map(str, HEAD_WIDTHS))}"
    return None


def whole(q_BSHK, k_BTGK, v_BTGK, *, spec):
    """See `lcx.ops.attention`, "Backends".

    Raises:
      UserError: the package is not there.
    """
    try:
        import tokamax
    except ModuleNotFoundError as error:
        raise UserError("attention: implementation='tokamax' needs a package that is not installed: lcx[tokamax]") from error
    causal, sides = window(spec.mask, k_BTGK.shape[1])
    kernels = next(kernels for kind, kernels in IMPLEMENTATIONS.items() if target()[1].startswith(kind))
    options = dict(scale=spec.scale, is_causal=causal, local_window_size=sides, logits_soft_cap=spec.softcap)
    return tokamax.dot_product_attention(q_BSHK, k_BTGK, v_BTGK, **options, implementation=kernels)
