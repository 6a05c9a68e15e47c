"""Gluon, which is Triton's language with layouts and shared memory by hand; in Triton's interpreter, what stands for it there.

Kernels take `jit` and `gl` from here, and from `triton.language` what both languages have. The interpreter knows no threads: a
layout is nothing there, and shared memory is an array that begins as not-a-number.
"""

import functools
import types

import numpy as np
import triton
import triton.language as tl
from triton.runtime.interpreter import TensorHandle


class _Memory:
    """Shared memory in the interpreter, with those methods of Gluon's descriptor that kernels here use."""

    def __init__(self, array: np.ndarray, dtype: tl.dtype):
        self.array, self.dtype = array, dtype

    def index(self, i):
        return _Memory(self.array[int(i)], self.dtype)

    def slice(self, start, length, dim):
        at = [slice(None)] * int(dim) + [slice(int(start), int(start) + int(length))]
        return _Memory(self.array[tuple(at)], self.dtype)

    def load(self, _):
        return tl.tensor(TensorHandle(self.array.copy(), self.dtype), tl.block_type(self.dtype, list(self.array.shape)))

    def store(self, x):
        if list(x.shape) != list(self.array.shape):
            raise ValueError(f"a tensor {x.shape} does not fit shared memory {self.array.shape}")
        self.array[...] = x.handle.data


if triton.knobs.runtime.interpret:
    jit = triton.jit
    gl = types.SimpleNamespace(
        arange=lambda start, end, _: tl.arange(start, end),
        convert_layout=lambda x, _: x,
        allocate_shared_memory=lambda dtype, shape, _: _Memory(np.full([int(n) for n in shape], np.nan, np.float32), dtype),
        **dict.fromkeys(("BlockedLayout", "SliceLayout", "SwizzledSharedLayout"), lambda *_: None),
    )
else:
    from triton.experimental.gluon import jit
    from triton.experimental.gluon import language as gl

__all__ = ["gl", "jit", "keep_layouts"]


@functools.cache
def keep_layouts() -> None:
    """Has jax-triton compile Gluon's kernels by Gluon's passes.

    It takes such kernels (0.4.1), but sends them through the passes of Triton proper, which choose layouts anew. Sums that
    were to stay in a thread then go through exchanges between threads: right, and slow.
    """
    from jax_triton import triton_lib

    compile_module = triton_lib.compile_ttir_inplace

    def compiled(module, backend, options, gpu_target):
        if module.get_int_attr("ttg.num-warps") is not None:  # what is in Gluon knows its warps from the beginning
            backend = _as_written(type(backend))(backend.target)
        return compile_module(module, backend, options, gpu_target)

    triton_lib.compile_ttir_inplace = compiled


def _as_written(backend):
    """A class of backend with Gluon's passes where jax-triton asks for those of Triton proper."""

    class AsWritten(backend):
        def make_ttir(self, module, *_):
            return module

        def make_ttgir(self, module, metadata, options, *more):
            return self.gluon_to_ttgir(module, metadata, options, *more)

    return AsWritten
