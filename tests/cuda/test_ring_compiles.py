"""A ring over eight H100s, compiled ahead of time: every transfer is hidden behind a kernel. Not run."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from lcx.command import GPU_OPTIONS
from lcx.mesh import make_mesh
from lcx.ops.types import Mask
from lcx.parallel.attention import context_attention
from lcx.planning.gpus import h100s
from lcx.planning.schedule import overlapped, transfers
from lcx.sharding import activation_spec
from tests.cuda.installed import needs_cuda

pytestmark = needs_cuda
# What tests/conftest.py has XLA leave out.
OPTIMISED = dict(xla_backend_optimization_level=3, xla_llvm_disable_expensive_passes=False)


def compile_ring(kv_heads: int, options: dict[str, int]):
    """Forward and backward pass of causal attention over packed documents, bf16, zigzag, 8,192 tokens a device."""
    mesh = make_mesh(seq=8, devices=h100s(8))
    S, H, K = 2**13 * mesh.size, 32, 128

    def shape(dims, *sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, activation_spec(dims)))

    def passes(q, k, v, ids, do):
        attention = lambda *qkv: context_attention(*qkv, mesh=mesh, mask=Mask(), segments_BS=ids, implementation="mosaic_gpu")
        o, pull = jax.vjp(attention, q, k, v)
        return o, pull(do)

    q, k = shape("BSHK", 1, S, H, K), shape("BTGK", 1, S, kv_heads, K)
    with jax.set_mesh(mesh), jax.default_matmul_precision("default"):
        lowered = jax.jit(passes).lower(q, k, k, shape("BS", 1, S, dtype=jnp.int32), q)
    return lowered.compile(compiler_options=OPTIMISED | options)


@pytest.mark.parametrize("kv_heads", [8, 32])
def test_a_ring_of_gpus_hides_its_transfers(kv_heads, capsys):
    compiled = compile_ring(kv_heads, GPU_OPTIONS)
    permutes = [transfer for transfer in transfers(compiled.as_text()) if transfer.kind == "collective-permute"]
    temporary = compiled.memory_analysis().temp_size_in_bytes / 2**30
    with capsys.disabled():
        times = sum(transfer.times for transfer in permutes)
        print(f"\na ring of H100s, {kv_heads} key/value heads: {times} messages, {temporary:.2f} GiB temporary a device", end="")
    assert all(transfer.asynchronous for transfer in permutes)
    assert overlapped(compiled.as_text()) == 1.0
    assert temporary <= 1.0


def test_messages_in_parts_would_not_be_hidden():
    """The twin: without its option XLA has one part of a hop under way at a time and waits for the others."""
    assert overlapped(compile_ring(8, {}).as_text()) < 0.6
