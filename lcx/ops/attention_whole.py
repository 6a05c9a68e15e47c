"""What kernels of others that compute whole attention have in common: what none of them takes, and how a mask is said to them."""

import jax.numpy as jnp

from lcx.ops.types import AttentionSpec, Mask

DTYPES = (jnp.bfloat16, jnp.float16)


def unsuitable(spec: AttentionSpec, shapes: dict, dtypes: dict) -> str | None:
    """What all of them refuse, in one line: see `lcx.ops.attention`, "Backends". None if nothing is against it.

    Documents, padding with them, are refused: those kernels take them as an S x T array or as lengths that are not known here.
    """
    if not spec.whole:
        return "it takes whole rows, in order from token 0, and gives no logsumexp, which parts and learned sinks need"
    for name, what in (("segments_q_BS", "document ids"), ("sink_BT", "sink tokens"), ("alibi_slopes_H", "ALiBi slopes")):
        if name in shapes:
            return f"it takes {what} only as an S x T array"
    S, T = shapes["q"][1], shapes["k"][1]
    if S != T and window(spec.mask, max(S, T)) != (False, None):
        return f"under a mask it takes as many queries as keys, and these are S={S} and T={T}"
    if dtypes["q"] not in DTYPES:
        return f"dtype {jnp.dtype(dtypes['q'])}; it takes {' and '.join(jnp.dtype(kind).name for kind in DTYPES)}"
    return None


def window(mask: Mask, length: int) -> tuple[bool, tuple[int, int] | None]:
    """(causal, (left, right) or None): `mask` over rows of `length` tokens, in as few words as possible.

    Sides that hide nothing are left out, and a window without right side is causal. `left` and `right` count tokens besides the
    query's own, as in `Mask` and in `jax.nn.dot_product_attention`.
    """
    left, right = (None if side is None or side >= length - 1 else side for side in (mask.left, mask.right))
    causal = right == 0
    if left is None and (right is None or causal):
        return causal, None
    everything = length - 1
    return causal, (everything if left is None else left, everything if right is None else right)
