"""The last program of every launch of a Triton kernel, alone and interpreted, on arrays that are too large to be filled.

Triton's interpreter computes an address in the integer types that the kernel has, so that an offset formed in 32 bits leads
elsewhere here as on a GPU. Arrays are virtual memory of zeros, of which only the last tokens are written.
"""

import jax
import numpy as np
import pytest
from triton.runtime import interpreter

from pallas_kernels import interpret, triton_launch

BUILDER = interpreter.interpreter_builder
LOAD, STORE, ADD = BUILDER.create_masked_load, BUILDER.create_masked_store, BUILDER.create_addptr


class Reached(Exception):
    """The last launch that a test is about is done."""


class Lazy(np.ndarray):
    """Virtual memory. Taken for what it is already, nothing is copied."""

    def astype(self, dtype, **options):
        return self if dtype == self.dtype else super().astype(dtype, **options)


class LastProgram:
    """Stands in for `triton_launch.launch`: runs only the last program of every launch, and ends behind the one named `last`.

    Attributes:
      outputs, farthest: by launch and array, what it is filled with, and the farthest number that is read or written.
    """

    def __init__(self, last: str):
        self.last, self.outputs, self.farthest, self.arrays = last, {}, {}, {}

    def launch(self, kernel, name, *, grid, inputs, outputs, constants, warps=1):
        self.outputs[name] = {name: np.zeros(x.shape, x.dtype) for name, x in outputs.items() if x is not None}
        self.arrays = {name: np.asarray(x) for name, x in inputs.items() if x is not None} | self.outputs[name]
        self.reached = self.farthest[name] = dict.fromkeys(self.arrays, -1)
        absent = dict.fromkeys((inputs | outputs).keys() - self.arrays.keys())
        with pytest.MonkeyPatch.context() as patch, triton_launch._patched_once():
            patch.setattr(BUILDER, "set_grid_dim", lambda *_: setattr(BUILDER, "grid_dim", grid))
            patch.setattr(BUILDER, "set_grid_idx", lambda *_: setattr(BUILDER, "grid_idx", [n - 1 for n in grid]))
            kernel[(1,)](**{name: triton_launch._Memory(x) for name, x in self.arrays.items()}, **constants, **absent)
        if name == self.last:
            raise Reached
        return self.outputs[name]

    def load(self, pointers, mask, *more):
        self.check(pointers, mask)
        return LOAD(pointers, mask, *more)

    def store(self, pointers, x, mask, *more):
        self.check(pointers, mask)
        return STORE(pointers, x, mask, *more)

    def check(self, pointers, mask):
        at = np.broadcast_to(pointers.data, mask.data.shape)[mask.data.astype(bool)].astype(np.int64)
        left = at.size
        for name, x in self.arrays.items():
            number = (at - x.ctypes.data) // x.itemsize
            number = number[(number >= 0) & (number < x.size)]
            self.reached[name] = max(self.reached[name], number.max(initial=-1))
            left -= number.size
        if left:
            raise IndexError("an address outside of every array")


def run(last, call, add=ADD):
    """The launches of a call up to that of this name; `add`: how an offset is added to a pointer."""
    found = LastProgram(last)
    with pytest.MonkeyPatch.context() as patch, interpret.interpreted(), jax.disable_jit():
        patch.setattr(triton_launch, "launch", found.launch)
        for name, method in dict(masked_load=found.load, masked_store=found.store, addptr=add).items():
            patch.setattr(BUILDER, f"create_{name}", method)
        with pytest.raises(Reached):
            call()
    return found


def add_in_32_bits(pointer, offset):
    """The twin."""
    return ADD(pointer, interpreter.TensorHandle(offset.data.astype(np.int32), offset.dtype))


def compare_far(call, front, **far):
    """What a call's last programs write behind so many tokens of zeros: bit for bit what they write without them. And the twin.

    Args:
      call: tokens in front of the last ones -> None.
      far: by launch of the call, the arrays of which numbers beyond 2^31 are read or written.
    """
    *_, last = far
    found, alone = run(last, lambda: call(front)), run(last, lambda: call(0))
    for launch, names in far.items():
        for name, x in alone.outputs[launch].items():
            assert np.any(x), (launch, name)
            tail = found.outputs[launch][name][tuple(slice(-size, None) for size in x.shape)]
            np.testing.assert_array_equal(tail, x, err_msg=f"{launch}: {name}")
        assert all(found.farthest[launch][name] >= 2**31 for name in names.split()), (launch, found.farthest[launch])
    with pytest.raises(interpreter.InterpreterError, match="outside of every array"):
        run(last, lambda: call(front), add_in_32_bits)
