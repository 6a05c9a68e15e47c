"""Where arrays live on the mesh, and the one wrapper for code that runs once per device.

Parameters and optimizer state are spread over (fsdp, seq) x tensor and gathered layer by layer: in long-context training the
batch is often a single sequence and every device is on `seq`, so parameters replicated there would not fit.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lcx.mesh import AXES, BATCH_AXES

PARAMETER_AXES = {"D": ("fsdp", "seq"), "H": ("tensor",), "G": ("tensor",), "F": ("tensor",), "V": ("tensor",), "E": ("tensor",)}
ACTIVATION_AXES = {
    "B": BATCH_AXES,
    "S": ("seq",),
    "T": ("seq",),
    "H": ("tensor",),
    "G": ("tensor",),
    "F": ("tensor",),
    "V": ("tensor",),
    "E": ("tensor",),
}
TOKEN_AXES = ("data", "fsdp", "seq")


def parameter_spec(dims: str) -> PartitionSpec:
    """The partition of a parameter with these logical dimensions; vectors (norm scales, biases) are replicated."""
    if len(dims.removeprefix("L")) < 2:
        return PartitionSpec()
    if "D" not in dims:  # the maps of a recurrence: nothing else is wide enough to spread
        return PartitionSpec(*(("tensor", "fsdp", "seq") if dim == "E" else PARAMETER_AXES.get(dim) for dim in dims))
    return PartitionSpec(*(PARAMETER_AXES.get(dim) for dim in dims))


def activation_spec(dims: str) -> PartitionSpec:
    """The partition of an activation with these dimensions, e.g. BSHK -> (data+fsdp, seq, tensor, none)."""
    return PartitionSpec(*(ACTIVATION_AXES.get(dim) for dim in dims))


@dataclasses.dataclass(frozen=True)
class ParameterInfo:
    """What the code that updates, places or names parameters goes by.

    Attributes:
      dims: logical dimensions, with a leading L where layers are stacked.
      decay: weight decay may apply.
    """

    dims: str
    decay: bool

    @property
    def layer_dims(self) -> str:
        """The dimensions within one layer."""
        return self.dims.removeprefix("L")


def parameter_info(state: nnx.State) -> Any:
    """A `ParameterInfo` for every parameter, in the nesting of `nnx.to_pure_dict(state)`."""

    def info(param: nnx.Param) -> ParameterInfo:
        dims = "".join(param.get_metadata("dims"))
        stacked = param.get_value().ndim == len(dims) + 1
        return ParameterInfo(("L" if stacked else "") + dims, param.get_metadata().get("decay", True))

    return nnx.to_pure_dict(jax.tree.map(info, state, is_leaf=lambda x: isinstance(x, nnx.Variable)))


def parameter_shardings(info: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every parameter of an info tree."""
    return jax.tree.map(lambda i: NamedSharding(mesh, parameter_spec(i.dims)), info)


def constrain(x: jax.Array, dims: str, mesh: Mesh) -> jax.Array:
    """Keeps an activation on its place in the mesh."""
    return lax.with_sharding_constraint(x, NamedSharding(mesh, activation_spec(dims)))


def _restrict(spec: PartitionSpec, axes: tuple[str, ...]) -> PartitionSpec:
    """The spec with every axis outside `axes` left out."""
    keep = lambda entry: tuple(a for a in ((entry,) if isinstance(entry, str) else entry or ()) if a in axes) or None
    return PartitionSpec(*(keep(entry) for entry in spec))


def per_shard(
    fn: Callable, *, mesh: Mesh, in_specs: Any, out_specs: Any, form: str = "kernel", checked: bool = False
) -> Callable:
    """`fn` run once per device on local slices.

    Args:
      fn: function of local arrays.
      mesh: the device mesh.
      in_specs, out_specs: pytrees of PartitionSpec, in either form written over all axes.
      form: "kernel": every axis is manual (Mosaic kernels accept nothing less). "tokenwise": data, fsdp and seq are
        manual and tensor stays with the compiler, so `fn` sees whole heads and a whole feed-forward width. Where tensor is
        one device the two are the same.
      checked: JAX proves that what `out_specs` leave whole is equal on all devices; loops inside have to start from values of
        `lcx.ops.varying.alike`.
    """
    if form not in ("kernel", "tokenwise"):
        raise ValueError(f"per_shard form={form!r} is not known (valid: kernel, tokenwise)")
    axes = AXES if form == "kernel" or mesh.shape["tensor"] == 1 else TOKEN_AXES
    if form == "tokenwise" and all(mesh.shape[axis] == 1 for axis in axes):
        # Every device already has all tokens; XLA's partitioner rejects a manual region whose manual axes hold one device.
        return fn
    is_spec = lambda x: isinstance(x, PartitionSpec)
    restrict = lambda specs: jax.tree.map(lambda s: _restrict(s, axes), specs, is_leaf=is_spec)
    return jax.shard_map(
        fn,
        mesh=mesh,
        in_specs=restrict(in_specs),
        out_specs=restrict(out_specs),
        axis_names=set(axes),
        check_vma=checked,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gather(w: jax.Array, dims: str, dtype: jnp.dtype, mesh: Mesh) -> jax.Array:
    """A device's slice of a parameter -> the parameter whole over its (fsdp, seq) axes. Call inside `per_shard`, before any loop.

    The values travel in `dtype` and come back in w's own, so that gradients add up over chunks and devices in fp32.
    """
    return _gather_forward(w, dims, dtype, mesh)[0]


def _gathered_dims(dims: str, mesh: Mesh) -> list[tuple[int, tuple[str, ...]]]:
    found = []
    for dim, entry in enumerate(parameter_spec(dims)):
        axes = tuple(a for a in entry or () if a in TOKEN_AXES and mesh.shape[a] > 1)
        if axes:
            found.append((dim, axes))
    return found


def _gather_forward(w, dims, dtype, mesh):
    full = w.astype(dtype)
    for dim, axes in _gathered_dims(dims, mesh):
        full = lax.all_gather(full, axes, axis=dim, tiled=True)
    return full.astype(w.dtype), None


def _gather_backward(dims, dtype, mesh, _, grad):
    for dim, axes in _gathered_dims(dims, mesh):
        grad = lax.psum_scatter(grad, axes, scatter_dimension=dim, tiled=True)
    return (grad,)


gather.defvjp(_gather_forward, _gather_backward)


def tokenwise(fn: Callable, weights: Any, *tokens: Any, mesh: Mesh, dtype: jnp.dtype) -> Any:
    """Runs `fn(weights, *tokens)` on each device's own tokens, with the weights gathered once beforehand.

    Over `tensor` the compiler adds up the parts of a product (over heads, over F) in the activations' type, one rounding more
    than on one device: in fp32 they would be twice the bytes on the wire.

    Args:
      fn: function of a pytree of whole (over fsdp and seq) fp32 weights, whose values are rounded to `dtype`, and of local
        token arrays B s ...; returns local token arrays B s ....
      weights: pytree of parameters; each carries its logical dimensions.
      *tokens: pytrees of arrays B S ...
      mesh: the device mesh.
      dtype: the type the weights travel in.
    """
    params, treedef = jax.tree.flatten(weights, is_leaf=lambda x: isinstance(x, nnx.Variable))
    dims = ["".join(p.get_metadata("dims")) for p in params]
    specs = [parameter_spec(d) for d in dims]
    tokens_spec = activation_spec("BS")

    def local(values, *tokens):
        whole = [gather(w, d, dtype, mesh) for w, d in zip(values, dims, strict=True)]
        return fn(jax.tree.unflatten(treedef, whole), *tokens)

    run = per_shard(local, mesh=mesh, in_specs=(specs, *(tokens_spec for _ in tokens)), out_specs=tokens_spec, form="tokenwise")
    return run([p.get_value() for p in params], *tokens)
