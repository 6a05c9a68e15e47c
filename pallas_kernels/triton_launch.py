"""Launching Triton kernels with arrays by name: compiled for GPUs, or interpreted on the host by Triton's own interpreter.

A kernel is decorated with `triton.jit` when its module is imported, and what that makes of it, a program to compile or one to
interpret, is decided there by the environment variable TRITON_INTERPRET. A process has one or the other.
"""

import contextlib
import functools
import importlib.util
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter

from lcx.ops.varying import alike
from pallas_kernels import interpret, triton_shared
from pallas_kernels.support_mesh import left_to_compiler

# What is compiled for where no GPU is: a topology of Hoppers.
CAPABILITY = 90
# Of CUDA 13.0, the oldest of JAX's CUDA 13 packages. Triton would write that of its own assembler, which the one that JAX finds
# first on a machine may be too old to read.
PTX, PACKAGE = 90, "jax_cuda13_plugin"
# What the kernels have been compiled for, and their shared memory counted: others have less, or other matrix units.
DEVICES = ("H100", "H200", "GH200")
# Of the second and third dim of a grid; the first may have 2^31.
MOST_PROGRAMS = 65_535
ONE_AT_A_TIME = threading.Lock()  # the interpreter's builder is global, and several devices call back at once
TYPES = {"bfloat16": tl.bfloat16, "float16": tl.float16, "float32": tl.float32, "int32": tl.int32, "int8": tl.int8}


def not_here(device_kind: str) -> str | None:
    """Why no kernel of this package in Triton runs where this is traced; None where they do, interpreted too."""
    if not any(name in device_kind for name in DEVICES) and not interpret.mode():
        return f"it is for {', '.join(DEVICES)} and this is {device_kind}"
    return refuse() or left_to_compiler()


def refuse() -> str | None:
    """Why this process can neither interpret nor compile Triton's kernels, in one line; None if it can do what is asked."""
    if interpret.mode() and not triton.knobs.runtime.interpret:
        return "interpreted, Triton needs TRITON_INTERPRET=1 in the environment before it is imported"
    if not interpret.mode() and triton.knobs.runtime.interpret:
        return "TRITON_INTERPRET=1 is set, with which Triton compiles nothing"
    if not interpret.mode() and importlib.util.find_spec(PACKAGE) is None:
        return "it needs JAX's CUDA 13 packages, lcx[cuda]"
    return None


def launch(
    kernel: Callable[..., None],
    name: str,
    *,
    grid: tuple[int, ...],
    inputs: dict[str, jax.Array | None],
    outputs: dict[str, jax.ShapeDtypeStruct | None],
    constants: dict[str, Any],
    warps: int = 1,
) -> dict[str, jax.Array]:
    """Runs a kernel on pointers by name and returns the outputs by name; they begin with whatever stands in memory.

    Under `vmap` it runs once for each entry.

    Args:
      kernel: under `triton.jit` or `triton_shared.jit`; its parameters are the names of inputs, outputs and constants.
      name: of the kernel in profiles.
      grid: programs, at most 3 numbers.
      inputs, outputs: those that are None are None in the kernel too. bool arrives as int8.
      constants: known when it is compiled.
      warps: that a program takes.
    """
    if (reason := refuse()) is not None:
        raise RuntimeError(reason)
    if any(programs > MOST_PROGRAMS for programs in grid[1:]):
        raise ValueError(f"{name}: a grid of {grid} programs; the second and third dim take at most {MOST_PROGRAMS}")
    given = {name: x for name, x in inputs.items() if x is not None}
    given = {name: x.astype(jnp.int8) if x.dtype == jnp.bool_ else x for name, x in given.items()}
    wanted = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in outputs.items() if x is not None}
    absent = {name: None for name, x in (inputs | outputs).items() if x is None}
    run = _interpreted if interpret.mode() else _compiled

    @jax.custom_batching.sequential_vmap
    def one(*arrays):
        return run(kernel, name, grid, dict(zip(given, arrays, strict=True)), wanted, constants | absent, warps)

    return dict(zip(wanted, alike(one(*given.values()), *given.values()), strict=True))


def _compiled(kernel, name, grid, given, wanted, constants, warps):
    import jax_triton

    triton_shared.keep_layouts()
    here = any(device.platform == "gpu" for device in jax.local_devices())
    # jax-triton takes outputs for the parameters that are left, in the order in which the kernel has them.
    order = [parameter for parameter in kernel.arg_names if parameter in wanted]
    found = jax_triton.triton_call(
        **given,
        **constants,
        kernel=kernel,
        name=name,
        out_type=[wanted[parameter] for parameter in order],
        grid=grid,
        num_warps=warps,
        compute_capability=None if here else CAPABILITY,
        backend_options=dict(ptx_version=PTX, enable_fp_fusion=True),
    )
    return [found[order.index(parameter)] for parameter in wanted]


def _interpreted(kernel, name, grid, given, wanted, constants, warps):
    def on_host(arrays):
        memory = {name: _Memory(np.array(x)) for name, x in zip(given, arrays, strict=True)}
        memory |= {name: _Memory(_unwritten(x)) for name, x in wanted.items()}
        with ONE_AT_A_TIME, _patched_once():
            kernel[grid](**memory, **constants)
        return [memory[name].array for name in wanted]

    return jax.pure_callback(on_host, list(wanted.values()), list(given.values()))


@contextlib.contextmanager
def _patched_once() -> Iterator[None]:
    """Triton's interpreter puts its own functions into Triton's language at every call of a function in a kernel. That takes a
    good part of its time; inside the block it is done once for each function."""
    patch = interpreter._patch_lang
    interpreter._patch_lang = functools.cache(patch)
    try:
        yield
    finally:
        interpreter._patch_lang = patch


def _unwritten(x) -> np.ndarray:
    """Not a number wherever the type has such a thing, so that what no program writes is noticed."""
    return np.full(x.shape, np.nan if jnp.issubdtype(x.dtype, jnp.floating) else -1, x.dtype)


class _Memory:
    """An array as the interpreter wants its arguments: with those of a tensor's methods that it calls."""

    device = "cpu"

    def __init__(self, array: np.ndarray):
        self.array, self.shape, self.dtype = array, array.shape, TYPES[array.dtype.name]

    def data_ptr(self):
        return self.array.ctypes.data

    def untyped_storage(self):
        return self

    def size(self):
        return self.shape

    def stride(self):
        return tuple(step // self.array.itemsize for step in self.array.strides)

    def storage_offset(self):
        return 0

    def element_size(self):
        return self.array.itemsize

    def cpu(self):
        return self

    def new_empty(self, *_, **__):
        return self

    def set_(self, *_):
        """The copy on the host that the interpreter makes is this memory itself."""

    def copy_(self, _):
        """Nor is anything to be copied back."""
