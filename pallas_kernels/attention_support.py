"""What no kernel of attention takes, whatever it is for."""

from typing import Any

import jax.numpy as jnp

from pallas_kernels.support_mesh import left_to_compiler


def unsuitable(shapes: dict, dtypes: dict, widths: tuple[int, ...], kinds: tuple[Any, ...]) -> str | None:
    """What every kernel of attention refuses, in one line: see `lcx.ops.attention`, "Backends". None if nothing is against it.

    Args:
      shapes, dtypes: as `refuse` gets them.
      widths, kinds: head widths and dtypes that the kernel takes.
    """
    for name in ("order_q", "order_k"):
        if name in shapes:
            return f"{name} is an array; it takes lcx.ops.Runs, only the reference takes arrays"
    if (reason := left_to_compiler()) is not None:
        return reason
    if (K := shapes["q"][3]) not in widths:
        return f"head width K={K}; it takes {', '.join(map(str, widths))}"
    if dtypes["q"] not in kinds:
        return f"dtype {jnp.dtype(dtypes['q'])}; it takes {' and '.join(jnp.dtype(kind).name for kind in kinds)}"
    return None
