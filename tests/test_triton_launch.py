"""Triton kernels by name: interpreted in a program, over devices, and why they are not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton
import triton.language as tl
from jax.sharding import PartitionSpec

from pallas_kernels import interpret, triton_launch
from pallas_kernels.triton_shared import gl, jit


@triton.jit
def scaled(x, marks, factor, out, total, size: tl.constexpr, block: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    y = tl.load(x + i, mask=i < size, other=0.0).to(tl.float32)
    y = tl.where(tl.load(marks + i, mask=i < size, other=0) != 0, y, 0.0)
    if factor is not None:
        y = y * tl.load(factor)
    tl.store(out + i, y.to(out.dtype.element_ty), mask=i < size)
    if total is not None:
        tl.store(total + tl.program_id(0), tl.sum(y))


def run(x, marks, factor=None, total=False):
    programs = triton.cdiv(x.size, 8)
    found = triton_launch.launch(
        scaled,
        "scaled",
        grid=(programs,),
        inputs=dict(x=x, marks=marks, factor=factor),
        outputs=dict(total=jax.ShapeDtypeStruct((programs,), jnp.float32) if total else None, out=x),
        constants=dict(size=x.size, block=8),
    )
    return (found["out"], found["total"]) if total else found["out"]


def test_what_is_absent_is_absent_in_the_kernel():
    x, marks = jnp.arange(20, dtype=jnp.bfloat16), np.arange(20) % 2 == 1
    with interpret.interpreted():
        plain = jax.jit(run)(x, marks)
        out, total = jax.jit(lambda *a: run(*a, total=True))(x, marks, jnp.full((1,), 3.0))
    expected = np.where(marks, np.arange(20), 0)
    assert plain.dtype == out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(plain.astype(np.float32), expected)
    np.testing.assert_array_equal(out.astype(np.float32), 3 * expected)
    np.testing.assert_array_equal(total, [3 * expected[i : i + 8].sum() for i in (0, 8, 16)])


@jit
def turned(x, out, rows: tl.constexpr, unstored: tl.constexpr, wrong: tl.constexpr):
    """Every row through shared memory, backwards; all but `unstored` are put there."""
    memory = gl.allocate_shared_memory(tl.float32, [rows, 4], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    layout: tl.constexpr = gl.BlockedLayout([1, 1], [8, 4], [1, 1], [1, 0])
    at = gl.arange(0, 4, gl.SliceLayout(0, layout))[None, :]
    for i in tl.static_range(rows - unstored):
        memory.slice(i, 1 + wrong, 0).store(tl.load(x + i * 4 + at))
    for i in tl.static_range(rows):
        tl.store(out + i * 4 + at, memory.slice(rows - 1 - i, 1, 0).load(layout))


def test_shared_memory_in_the_interpreter():
    """It keeps what is stored, has no number where nothing is, and takes no tensor of another shape."""
    x = np.arange(16, dtype=np.float32).reshape(4, 4)

    def call(unstored=0, wrong=0):
        sizes = dict(rows=4, unstored=unstored, wrong=wrong)
        return triton_launch.launch(turned, "turned", grid=(1,), inputs=dict(x=x), outputs=dict(out=x), constants=sizes)["out"]

    with interpret.interpreted():
        np.testing.assert_array_equal(call(), x[::-1])
        np.testing.assert_array_equal(call(unstored=1), [[np.nan] * 4, *x[2::-1]])
        with pytest.raises(jax.errors.JaxRuntimeError, match="does not fit shared memory"):
            call(wrong=1).block_until_ready()


def test_over_devices(mesh_of):
    """The results differ between devices as the operands do."""
    tokens = PartitionSpec("seq")
    x = jnp.arange(32.0)
    with interpret.interpreted(), jax.set_mesh(mesh_of(seq=4)):
        out = jax.jit(jax.shard_map(run, in_specs=(tokens, tokens), out_specs=tokens))(x, x > 5)
    np.testing.assert_array_equal(out, np.where(x > 5, x, 0))


def test_what_was_decided_before_triton_was_imported(monkeypatch):
    assert "TRITON_INTERPRET=1 is set" in triton_launch.refuse()
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(triton_launch, "PACKAGE", "jax")
    assert triton_launch.refuse() is None
    monkeypatch.setattr(triton_launch, "PACKAGE", "jax_cuda_99")
    assert "CUDA 13 packages" in triton_launch.refuse()
    with interpret.interpreted(), pytest.raises(RuntimeError, match="needs TRITON_INTERPRET=1 in the environment"):
        run(jnp.zeros(8), np.ones(8, bool))


def test_grids_that_cuda_does_not_start():
    with interpret.interpreted(), pytest.raises(ValueError, match=r"turned: a grid of \(1, 65536\).*at most 65535"):
        triton_launch.launch(turned, "turned", grid=(1, 65_536), inputs={}, outputs={}, constants={})
