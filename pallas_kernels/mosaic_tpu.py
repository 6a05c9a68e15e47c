"""Launching Pallas Mosaic kernels for TPU with references by name, and what every such kernel needs."""

import dataclasses
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import interpret
from pallas_kernels.support_mesh import varying

DEVICES = ("TPU v4", "TPU v5", "TPU v6")
# Kinds of which one device is two cores that share programs: those of "parallel" dimensions of the grid.
TWO_CORES = ("TPU v4", "TPU v5", "TPU v5p")


def not_for(device_kind: str) -> str | None:
    """Why kernels of this file do not run on a device; None where they do, interpreted too."""
    if device_kind.startswith(DEVICES) or interpret.mode():
        return None
    return f"it is for {', '.join(DEVICES)} and this is {device_kind}"


def vmem_bytes(device_kind: str) -> int:
    """What a program may take of a core's vector memory."""
    return 2**24 if device_kind == "TPU v4" else 2**26


@dataclasses.dataclass
class Operand:
    """An array that a kernel reads or writes, and which block of it each program gets.

    Attributes:
      array: None where the call has none; its reference is then None. For an output its shape and dtype.
      spec: of its blocks; None leaves it in HBM, to be copied by hand.
    """

    array: Any
    spec: pl.BlockSpec | None = None


def scalars(array: jax.Array | None) -> Operand:
    """A small array that every program sees whole, in scalar memory."""
    return Operand(array, pl.BlockSpec(memory_space=pltpu.SMEM))


def launch(
    kernel: Callable[[types.SimpleNamespace], None],
    name: str,
    *,
    grid: tuple[int, ...],
    inputs: dict[str, Operand],
    outputs: dict[str, Operand],
    scratch: dict[str, Any],
    cost: pl.CostEstimate,
    aliases: dict[str, str] | None = None,
    ordered: int = 1,
    vmem_bytes: int | None = None,
) -> dict[str, jax.Array]:
    """Runs `kernel(refs)`, every reference under its name, and returns the outputs by name.

    Args:
      kernel: the program.
      name: of the kernel in profiles and dumps.
      grid: programs.
      inputs, outputs, scratch: by name; what is None in `inputs` (as an array) or in `scratch` is None in `refs`.
      cost: what the compiler's scheduler weighs transfers against; without it a kernel counts as nothing to hide behind.
      aliases: input -> output that takes its memory.
      ordered: grid dimensions, counted from the last, that run in order; the others in any.
      vmem_bytes: of the chip's memory; None is what the compiler allows any kernel.
    """
    absent = [name for name, operand in inputs.items() if operand.array is None]
    absent += [name for name, shape in scratch.items() if shape is None]
    inputs = {name: operand for name, operand in inputs.items() if operand.array is not None}
    scratch = {name: shape for name, shape in scratch.items() if shape is not None}
    names = [*inputs, *outputs, *scratch]
    specs = lambda operands: [operand.spec or pl.BlockSpec(memory_space=pl.ANY) for operand in operands.values()]
    place = lambda operands, name: list(operands).index(name)
    found = pl.pallas_call(
        lambda *refs: kernel(types.SimpleNamespace(**dict.fromkeys(absent), **dict(zip(names, refs, strict=True)))),
        grid=grid,
        in_specs=specs(inputs),
        out_specs=specs(outputs),
        scratch_shapes=list(scratch.values()),
        out_shape=varying([operand.array for operand in outputs.values()], [operand.array for operand in inputs.values()]),
        input_output_aliases={place(inputs, a): place(outputs, b) for a, b in (aliases or {}).items()},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * (len(grid) - ordered) + ("arbitrary",) * ordered, vmem_limit_bytes=vmem_bytes
        ),
        cost_estimate=cost,
        interpret=interpret.mode(),
        name=name,
    )(*(operand.array for operand in inputs.values()))
    return dict(zip(outputs, found, strict=True))


def dot(a: jax.Array, b: jax.Array, a_dim: int, b_dim: int) -> jax.Array:
    """Product over one dim of each, accumulated in fp32; of fp32 operands to fp32 precision."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dims = (((a_dim,), (b_dim,)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def to_sublanes(row_1c: jax.Array) -> jax.Array:
    """(1, c) -> (c, 1)."""
    return jnp.broadcast_to(row_1c, (8, row_1c.shape[1])).T[:, :1]
