"""Attention over a mesh a few heads at a time, so that what travels and is summed in fp32 takes little memory.

Heads do not know of each other, so no product is computed twice, and keys and values travel as before in smaller messages; only
document ids go round in every pass. What is in flight (keys and values twice, their fp32 gradients several times) and results
in fp32, on one device too, shrink with the number of passes; inputs and results in their own type remain.
Source for the idea, with Ulysses: Untied Ulysses (UPipe), 2026.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from lcx.ops.types import Mask
from lcx.ops.varying import alike

# (query, key) pairs over all heads of a pass in one hop. At 2^30 and K=128 a hop computes 0.5 TFLOP forward, milliseconds on any
# chip, beside which starting a transfer takes nothing.
PAIRS = 2**30


def head_passes(mask: Mask, tokens: int, q_heads: int, kv_heads: int, fits: Callable[[int], bool]) -> int:
    """How many passes to make.

    Args:
      mask: a window limits the pairs of a hop.
      tokens: of one device.
      q_heads, kv_heads: that one tensor shard holds.
      fits: whether the strategy serves a part of the heads as well, by the number of passes.
    """
    seen = tokens if mask.left is None or mask.right is None else min(tokens, mask.left + mask.right + 1)
    fewest = PAIRS / (tokens * seen)  # query heads in a pass
    divisors = [n for n in range(kv_heads, 0, -1) if kv_heads % n == 0]
    return next((n for n in divisors if q_heads // n >= fewest and fits(n)), 1)


def in_passes(function: Callable, passes: int, dims: tuple[str, ...], out_dims: tuple[str, ...], out_dtypes: tuple) -> Callable:
    """`function` of local arrays, applied to an equal part of the heads at a time; results in `out_dtypes`.

    Args:
      function: (*arrays) -> arrays, each head on its own (a group of query heads with its key/value head).
      passes: how often; it divides every dim H and G.
      dims, out_dims: logical dims of the arguments and results; those with H or G are cut there.
      out_dtypes: of the results.
    """
    cut = lambda name: next((i for i, dim in enumerate(name) if dim in "HG"), None)

    def rounded(*arrays):
        return tuple(x.astype(dtype) for x, dtype in zip(function(*arrays), out_dtypes, strict=True))

    if passes == 1:
        return rounded

    def part(x, dim, i):
        size = x.shape[dim] // passes
        return lax.dynamic_slice_in_dim(x, i * size, size, axis=dim)

    def run(*arrays):
        parts = lambda i: [x if x is None or cut(d) is None else part(x, cut(d), i) for x, d in zip(arrays, dims, strict=True)]

        def one_pass(i, results):
            found = zip(results, rounded(*parts(i)), out_dims, strict=True)
            return tuple(lax.dynamic_update_slice_in_dim(x, new, i * new.shape[cut(d)], axis=cut(d)) for x, new, d in found)

        whole = lambda x, d: jnp.zeros([n * passes if i == cut(d) else n for i, n in enumerate(x.shape)], x.dtype)
        shapes = jax.eval_shape(lambda: rounded(*parts(0)))
        start = alike(tuple(whole(x, d) for x, d in zip(shapes, out_dims, strict=True)), shapes)
        return lax.fori_loop(0, passes, one_pass, start)

    return run
