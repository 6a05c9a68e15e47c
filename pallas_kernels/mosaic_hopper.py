"""Mosaic GPU kernels for Hopper: references by name, warpgroups that copy and compute, rings of shared memory between them.

A program is one warpgroup that copies and one or two that compute, 64 rows each: what one matrix instruction takes. Matrices go
through shared memory; sums stay in registers.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lcx.ops.varying import alike
from pallas_kernels import interpret

ROWS = 64  # of a tile, to each warpgroup that computes


# Registers.


def per_token(dim: int) -> Any:
    """How a vector lies in registers beside the dim of a tile that it belongs to."""
    return plgpu.Layout.WGMMA.reduce(1 - dim)


def along(x: jax.Array, dim: int, shape: tuple[int, ...]) -> jax.Array:
    """A vector along `dim`, broadcast to a tile."""
    return lax.broadcast_in_dim(x, shape, (dim,))


def constant(value: float, shape: tuple[int, ...]) -> jax.Array:
    """fp32 in registers: a tile, or a vector along dim 0 of one."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), plgpu.Layout.WGMMA if len(shape) == 2 else per_token(0))


def load(ref, dim: int) -> jax.Array:
    """A vector in global or shared memory, along `dim` of a tile."""
    return plgpu.load(ref, layout=per_token(dim), optimized=False)


def product(a, b) -> jax.Array:
    """a @ b of references in shared memory, fp32."""

    def compute(sum_ref):
        plgpu.wgmma(sum_ref, a, b)
        return sum_ref[...]

    return pl.run_scoped(compute, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def add_product(total: jax.Array, a: jax.Array, b) -> jax.Array:
    """total + a @ b: a in registers, b in shared memory.

    Interpreted it is computed otherwise, for Pallas' interpreter has no matrix instruction with an operand in registers and no
    `run_state`. The last line is the one line of these kernels that no interpreter executes.
    """
    if interpret.mode():
        found = jnp.dot(a, b[...], preferred_element_type=jnp.float32)
        plgpu.commit_smem()  # b was read as no matrix instruction reads it, and is overwritten by a copy
        return total + found
    return pl.run_state(lambda sum_ref: plgpu.wgmma(sum_ref, a, b))(plgpu.ACC.init(total))


# Shared memory, and the warpgroups on its two ends.


def matrices(count: int, rows: int, K: int, dtype: jnp.dtype) -> Any:
    """Shared memory for `count` matrices (rows, K), as matrix instructions and copies want it."""
    transforms = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
    return plgpu.SMEM((count, rows, K), dtype, transforms=transforms)


class Ring:
    """Slots that tiles of some arrays pass through together, from the warpgroup that copies to those that compute.

    A slot is filled when its copies are complete, and used when all that compute have said so.
    """

    def __init__(self, refs: types.SimpleNamespace, *names: str):
        self.slots = [getattr(refs, f"{name}_slots") for name in names]
        self.filled, self.used = (getattr(refs, f"{names[0]}_{part}") for part in ("filled", "used"))

    @staticmethod
    def scratch(readers: int, **slots: Any) -> dict[str, Any]:
        """What the kernel has to allocate for `Ring(refs, *slots)`; `slots`: shared memory by name of the array."""
        first, stages = next(iter(slots)), next(iter(slots.values())).shape[0]
        barriers = {
            f"{first}_filled": plgpu.Barrier(num_arrivals=len(slots), num_barriers=stages),
            f"{first}_used": plgpu.Barrier(num_arrivals=readers, num_barriers=stages),
        }
        return {f"{name}_slots": x for name, x in slots.items()} | barriers

    def slot(self, t: jax.Array) -> jax.Array:
        """Where step t's tiles are."""
        return lax.rem(t, jnp.int32(self.slots[0].shape[0]))

    def receive(self, t: jax.Array) -> list[Any]:
        """Step t's tile of each array, once they are there."""
        plgpu.barrier_wait(self.filled.at[self.slot(t)])
        return [slots.at[self.slot(t)] for slots in self.slots]

    def release(self, t: jax.Array) -> None:
        """Step t's tiles are not read any more."""
        if len(self.slots) > 1:  # the vectors among them were read otherwise than by matrix instructions
            plgpu.commit_smem()
        plgpu.barrier_arrive(self.used.at[self.slot(t)])


def stream(total: jax.Array, rings: list[tuple[Ring, Callable[[jax.Array], list[Any]]]]) -> None:
    """Copies tiles 0 ... total - 1 into each ring from its `sources(t)`, as slots become free, and waits until all are used."""
    stages = rings[0][0].slots[0].shape[0]

    @pl.loop(jnp.int32(0), total)
    def _(t):
        for ring, sources in rings:
            slot = ring.slot(t)
            pl.when(t >= stages)(functools.partial(plgpu.barrier_wait, ring.used.at[slot]))
            for source, slots in zip(sources(t), ring.slots, strict=True):
                plgpu.copy_gmem_to_smem(source, slots.at[slot], ring.filled.at[slot])

    @pl.loop(jnp.maximum(total - stages, 0), total)
    def _(t):
        for ring, _ in rings:
            plgpu.barrier_wait(ring.used.at[ring.slot(t)])


def launch(
    kernel: Callable[[types.SimpleNamespace, jax.Array], tuple[Callable[[], None], Callable[[jax.Array], None]]],
    name: str,
    *,
    programs: int,
    computing: int,
    inputs: dict[str, jax.Array | None],
    outputs: dict[str, jax.ShapeDtypeStruct],
    scratch: dict[str, Any],
) -> dict[str, jax.Array]:
    """Runs `copy, compute = kernel(refs, program)` and returns the outputs by name.

    Args:
      kernel: takes references by name and the number of the program; `copy()` is what one warpgroup does, `compute(w)` what
        each of the others does.
      name: of the kernel in profiles and dumps.
      programs: how many; neighbours run at the same time.
      computing: warpgroups that compute.
      inputs: arrays by name; the reference to None is None.
      outputs: shapes and dtypes by name.
      scratch: shared memory and barriers by name.
    """
    absent = [name for name, x in inputs.items() if x is None]
    given = {name: x for name, x in inputs.items() if x is not None}

    def body(*refs, **scratch):
        refs = dict(zip([*given, *outputs], refs, strict=True))
        refs = types.SimpleNamespace(**dict.fromkeys(absent), **refs, **scratch)
        w = lax.axis_index("warpgroup")
        copy, compute = kernel(refs, lax.axis_index("program"))

        @pl.when(w < computing)
        def _():
            if computing > 1:  # one alone has all the registers that it can address
                plgpu.set_max_registers(240, action="increase")
            compute(w)

        @pl.when(w == computing)
        def _():
            if computing > 1:
                plgpu.set_max_registers(24, action="decrease")
            copy()

    mode = interpret.mode()
    if mode and not isinstance(mode, plgpu.InterpretGPUParams):
        mode = plgpu.InterpretGPUParams()
    found = plgpu.kernel(
        body,
        out_type=list(outputs.values()),
        scratch_types=scratch,
        grid=(programs,),
        grid_names=("program",),
        num_threads=computing + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=mode or None,
        kernel_name=name,
    )(*given.values())
    # Whatever `out_type` says, Pallas traces the kernel without knowledge of the mesh.
    return dict(zip(outputs, alike(found, *given.values()), strict=True))
