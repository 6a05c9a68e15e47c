"""Reading a schedule; and that rings compiled for TPUs hide every transfer behind a kernel. Compiled, not run."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from lcx import mesh
from lcx.ops import dispatch
from lcx.ops.types import Mask
from lcx.parallel.attention import context_attention
from lcx.planning.schedule import bytes_sent, overlapped, transfers
from lcx.planning.topologies import topology_mesh
from lcx.sharding import activation_spec

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="NOT CHECKED: compiling for TPUs needs pip install 'lcx[plan]' (libtpu)"
)

PROGRAM = """HloModule f, is_scheduled=true, num_partitions=4

%condition (c: (s32[], f32[4])) -> pred[] {
  %c = (s32[], f32[4]) parameter(0)
  %n = s32[] constant(7)
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%body (b: (s32[], f32[4])) -> (s32[], f32[4]) {
  %b = (s32[], f32[4]) parameter(0)
  %x = f32[4] get-tuple-element(%b), index=1
  %start = (f32[4], f32[4]) collective-permute-start(%x), source_target_pairs={{0,1}}
  %kernel = f32[4] custom-call(%x), custom_call_target="tpu_custom_call"
  %done = f32[4] collective-permute-done(%start)
  ROOT %t = (s32[], f32[4]) tuple(%b, %done)
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %p = f32[4] parameter(0)
  %late = (f32[4], f32[4]) collective-permute-start(%p), source_target_pairs={{0,1}}
  %add = f32[4] add(%p, %p)
  %late_done = f32[4] collective-permute-done(%late)
  %blocking = f32[4] collective-permute(%p), source_target_pairs={{0,1}}
  %outer = (f32[4], f32[4]) all-gather-start(%p), replica_groups={{0,1},{2,3}}
  %sum = f32[4] all-reduce(%p), replica_groups=[1,4]<=[4]
  %part = f32[1] reduce-scatter(%p)
  %w = (s32[], f32[4]) while(%p), condition=%condition, body=%body
  %outer_done = f32[4] all-gather-done(%outer)
  ROOT %r = f32[4] get-tuple-element(%w), index=1
}
"""


def test_what_runs_under_a_kernel():
    found = {(t.kind, t.asynchronous, t.kernels, t.times) for t in transfers(PROGRAM)}
    permute = "collective-permute"
    permutes = {(permute, True, 0, 1), (permute, False, 0, 1), (permute, True, 1, 7)}
    assert found == permutes | {("all-gather", True, 1, 1), ("all-reduce", False, 0, 1), ("reduce-scatter", False, 0, 1)}
    assert overlapped(PROGRAM) == 7 / 9
    assert overlapped(PROGRAM, "all-gather") == 1.0
    with pytest.raises(ValueError, match="no all-to-all"):
        overlapped(PROGRAM, "all-to-all")


def test_bytes_that_each_device_sends():
    """A permute: the array. A gather in pairs: half of the result. A sum over four: twice three quarters. A scatter: three."""
    assert bytes_sent(PROGRAM) == {"collective-permute": 9 * 16, "all-gather": 8, "all-reduce": 24, "reduce-scatter": 12}


def test_a_program_that_is_not_scheduled_is_refused():
    with pytest.raises(ValueError, match="no schedule"):
        transfers("HloModule f\n")


def compile_ring(target: str, tokens: int, kv_heads: int, heads: int = 32, layout: str = "zigzag"):
    """Forward and backward pass of causal attention over packed documents, bf16, over all devices of a target."""
    over = topology_mesh(target, seq=-1)
    S, K = tokens * over.size, 128

    def shape(dims, *sizes, dtype="bfloat16"):
        return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype), sharding=NamedSharding(over, activation_spec(dims)))

    def passes(q, k, v, ids, do):
        attend = functools.partial(context_attention, mesh=over, mask=Mask(), segments_BS=ids, layout=layout)
        o, pull = jax.vjp(attend, q, k, v)
        return o, pull(do)

    q, k = shape("BSHK", 1, S, heads, K), shape("BTGK", 1, S, kv_heads, K)
    with jax.set_mesh(over), jax.default_matmul_precision("default"), dispatch.recording({"attention": "mosaic_tpu"}):
        return jax.jit(passes).lower(q, k, k, shape("BS", 1, S, dtype="int32"), q).compile()


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [32, 8])
def test_a_ring_at_128k_tokens_hides_its_transfers_in_little_memory(kv_heads, capsys):
    """Over v5e:2x4, 32 query heads of 128. What travels exists for a few heads at a time."""
    compiled = compile_ring("v5e:2x4", 2**14, kv_heads)
    temporary = compiled.memory_analysis().temp_size_in_bytes / 2**30
    with capsys.disabled():
        print(f"\nattention of 131,072 tokens over v5e:2x4, {kv_heads} key/value heads: {temporary:.2f} GiB temporary a chip")
    assert temporary <= 1.0
    assert overlapped(compiled.as_text()) == 1.0


TARGETS = ("v4:2x2x2", "v5e:2x4", "v5e-64", "v5e-256", "v5p:2x2x2", "v5p:4x4x4", "v6e:2x4", "v6e-64")


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [32, 8])
@pytest.mark.parametrize("target", TARGETS)
def test_a_ring_at_8k_tokens_a_device_hides_its_transfers(target, kv_heads):
    """With 32 key/value heads half of them go each way round, and in the backward pass queries travel."""
    assert overlapped(compile_ring(target, 2**13, kv_heads).as_text()) == 1.0


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("target", ["v5e:2x4", "v5p:4x4x4"])
def test_a_ring_in_cyclic_order_hides_its_transfers(target):
    """Sixteen blocks of 512 tokens a device."""
    assert overlapped(compile_ring(target, 2**13, 8, layout="cyclic").as_text()) == 1.0


@needs_libtpu
@pytest.mark.slow
def test_in_the_order_of_their_numbers_chips_could_not_hide_them(monkeypatch):
    """The twin: over v5e-64, rings that are not closed walks are synchronous."""
    monkeypatch.setattr(mesh, "ring_order", lambda devices, seq, tensor: list(devices))
    assert overlapped(compile_ring("v5e-64", 2**13, 8).as_text()) < 0.5
