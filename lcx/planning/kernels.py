"""The kernels of one operation alone, compiled for a device that is not here: both passes of packed rows, as a mixer calls them.

Which kernels: Mosaic's for a TPU; for a GPU Triton's, and Mosaic's for attention. The dispatcher loads them by name, so a
refusal is an error.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding

from lcx.ops import causal_conv, selective_scan, ssd
from lcx.ops.attention import attention_backend
from lcx.ops.recurrence import marks
from lcx.ops.recurrence_backend import recurrence_backend
from lcx.ops.types import AttentionSpec, Mask, Runs, Segments
from lcx.planning.gpus import h100s
from lcx.planning.topologies import topology_mesh

# By the name of a chip: the slice whose first device is compiled for.
TPUS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
GPU = "h100"


class Target:
    """One device to compile for: a name from `TPUS`, or `GPU`."""

    def __init__(self, name: str):
        self.device = h100s(1)[0] if name == GPU else topology_mesh(TPUS[name], data=-1).devices.reshape(-1)[0]
        self.gpu = name == GPU

    def array(self, *dims: int, dtype: Any = "float32") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, jnp.dtype(dtype), sharding=SingleDeviceSharding(self.device))

    @contextlib.contextmanager
    def tracing(self) -> Iterator[None]:
        """What is traced inside is for this device."""
        mesh = Mesh([self.device], ("device",)).abstract_mesh
        with jax.sharding.use_abstract_mesh(mesh), jax.default_matmul_precision("default"):
            yield

    def compile(self, function: Callable, *arrays: Any) -> jax.stages.Compiled:
        with self.tracing():
            return jax.jit(function).lower(*arrays).compile()


def compile_selective_scan(
    target: str,
    S: int,
    E: int,
    N: int,
    dtype: Any = "bfloat16",
    *,
    plain: bool = False,
    passes: bool = True,
    summaries: bool = False,
) -> jax.stages.Compiled:
    """One row of the selective scan.

    Args:
      target: see `Target`.
      S, E, N: tokens, channels, states of a channel.
      dtype: of the arrays of tokens.
      plain: one document, and nothing that is optional; else all of it.
      passes, summaries: forward and backward pass; what a device says about its tokens, for states and for gradients.
    """
    here, spec = Target(target), selective_scan.ScanSpec()
    token, map_, channel = here.array(1, S, E, dtype=dtype), here.array(1, S, N, dtype=dtype), here.array(E)
    inputs = selective_scan.Inputs(token, token, here.array(E, N), map_, map_, channel)
    inputs = inputs if plain else inputs._replace(z_BSE=token, dt_bias_E=channel)
    segments = None if plain else here.array(1, S, dtype="int32")
    run = _recurrence("selective_scan", here, spec, inputs, passes, summaries)
    return here.compile(run, inputs, segments, here.array(1, E, N), token)


def compile_ssd(
    target: str, S: int, H: int, K: int, G: int, N: int, dtype: Any = "bfloat16", *, passes: bool = True, summaries: bool = False
) -> jax.stages.Compiled:
    """One row of state-space duality: H heads of width K, G groups of B and C, states of N; otherwise as above.

    Tokens come and go as B S E, as a mixer has them: on a TPU heads of 64 as the last dim would be padded in memory.
    """
    here, spec = Target(target), ssd.SsdSpec()
    head, flat = here.array(H), functools.partial(here.array, 1, S, dtype=dtype)
    x, maps = flat(H, K), flat(G, N)
    inputs = ssd.Inputs(x, flat(H), head, maps, maps, head, head)
    both = _recurrence("ssd", here, spec, inputs, passes, summaries)
    widened = lambda x, heads: x.reshape(1, S, heads, -1)
    by_token = lambda x: x.reshape(1, S, -1) if x.shape[:2] == (1, S) else x

    def run(inputs, segments, state, dy):
        x, B, C = widened(inputs.x_BSHK, H), widened(inputs.B_BSGN, G), widened(inputs.C_BSGN, G)
        found = both(inputs._replace(x_BSHK=x, B_BSGN=B, C_BSGN=C), segments, state, widened(dy, H))
        return jax.tree.map(by_token, found)

    inputs = inputs._replace(x_BSHK=flat(H * K), B_BSGN=flat(G * N), C_BSGN=flat(G * N))
    return here.compile(run, inputs, here.array(1, S, dtype="int32"), here.array(1, H, K, N), flat(H * K))


def _recurrence(op: str, here: Target, spec: Any, inputs: Any, passes: bool, summaries: bool) -> Callable:
    with here.tracing():
        backend = recurrence_backend(op, "triton" if here.gpu else "mosaic_tpu", spec, inputs)

    def run(inputs, segments, state, dy):
        inputs, found = inputs._replace(marks=marks(segments)), ()
        if passes:
            y, final, residuals = backend.forward(inputs, state, spec=spec)
            gradients, dstate = backend.backward(inputs, residuals, dy, final, spec=spec)
            found += y, gradients._replace(marks=None), dstate
        if summaries:
            found += backend.summary(inputs, spec=spec), backend.reverse_summary(inputs, dy, spec=spec)
        return found

    return run


def compile_causal_conv(
    target: str, S: int, E: int, dtype: Any = "bfloat16", *, plain: bool = False
) -> tuple[jax.stages.Compiled, jax.stages.Compiled]:
    """Both passes of one row of the convolution of 4 taps with silu, each a program of its own; `plain` as above."""
    here, spec = Target(target), causal_conv.ConvSpec("silu")
    x, segments = here.array(1, S, E, dtype=dtype), None if plain else here.array(1, S, dtype="int32")
    inputs = causal_conv.Inputs(x, here.array(E, 4), here.array(E), here.array(1, 3, E, dtype=dtype), segments)
    with here.tracing():
        backend = recurrence_backend("causal_conv", "triton" if here.gpu else "mosaic_tpu", spec, inputs)
    passes = functools.partial(backend.forward, spec=spec), functools.partial(backend.backward, spec=spec)
    return here.compile(passes[0], inputs), here.compile(passes[1], inputs, x)


def compile_attention(target: str, S: int, H: int, G: int, K: int, runs: int = 1, *, plain: bool = False) -> jax.stages.Compiled:
    """One causal row of documents in bf16: H heads of width K, G of keys and values; tokens in so many runs of their order.
    With `plain` one document of which nothing is hidden."""
    here, spec = Target(target), AttentionSpec(Mask(causal=not plain), K**-0.5)
    q, k = (here.array(1, S, heads, K, dtype="bfloat16") for heads in (H, G))
    rows, start = here.array(1, H, S), here.array(runs, dtype="int32")
    ids = None if plain else here.array(1, S, dtype="int32")
    with here.tracing():
        backend = attention_backend("mosaic_gpu" if here.gpu else "mosaic_tpu", spec, q, k, k)

    def passes(q, k, v, do, lse, delta, ids, start):
        order = Runs(start, S // runs)
        options = dict(spec=spec, order_q=order, order_k=order, segments=Segments(ids, ids))
        return backend.forward(q, k, v, **options), backend.backward(q, k, v, do, lse, delta, **options)

    return here.compile(passes, q, k, k, q, rows, rows, ids, start)
