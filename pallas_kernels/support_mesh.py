"""Kernels inside a manual region of a mesh: where they cannot be called, and how their results differ between devices."""

import jax
from jax.sharding import ManualAxisType


def left_to_compiler() -> str | None:
    """Why a kernel cannot be called here, in one line: some axis of the mesh in force is not manual. None if it can."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1 and (left := set(mesh.axis_names) - set(mesh.manual_axes)):
        return f"mesh axes {', '.join(sorted(left))} are left to the compiler here, which cannot divide a kernel"
    return None


def varying(results: list[jax.ShapeDtypeStruct], operands: list[jax.Array]) -> list[jax.ShapeDtypeStruct]:
    """The shapes of results that differ between devices wherever an operand does, as `jax.shard_map(check_vma=True)` asks."""
    axes = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in operands))
    kind = ManualAxisType(varying=axes)
    return [jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=kind) for x in results] if axes else results
