"""The loss over a mesh: tokens over (data, fsdp, seq), the vocabulary over `tensor`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from lcx.mesh import BATCH_AXES
from lcx.ops import linear_cross_entropy as local
from lcx.registry import UserError
from lcx.sharding import TOKEN_AXES, activation_spec, gather, parameter_spec, per_shard


@dataclasses.dataclass(frozen=True)
class VocabularyShards:
    """Statistics over a vocabulary of which each device along `axis` holds a slice; see `ops` `WholeVocabulary`."""

    axis: str
    shards: int

    def index(self) -> jax.Array:
        """Which slice of the vocabulary this device holds."""
        return lax.axis_index(self.axis)

    def max(self, x: jax.Array) -> jax.Array:
        """The largest value among the slices."""
        return lax.pmax(x, self.axis)

    def min(self, x: jax.Array) -> jax.Array:
        """The smallest value among the slices."""
        return lax.pmin(x, self.axis)

    def sum(self, x: jax.Array) -> jax.Array:
        """The sum over the slices."""
        return lax.psum(x, self.axis)


def linear_cross_entropy(
    x_BSD: jax.Array,
    w_DV: jax.Array,
    labels_BS: jax.Array,
    weights_BS: jax.Array,
    *,
    mesh: Mesh,
    chunk: int | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    per_token: bool = False,
    implementation: str = "auto",
) -> tuple[jax.Array, ...]:
    """`lcx.ops.linear_cross_entropy` of arrays that are spread over a mesh: the same values and gradients.

    The parts of dx from slices of the vocabulary add up in x's type, as everywhere over `tensor` (`lcx.sharding.tokenwise`).

    Args:
      x_BSD, labels_BS, weights_BS: batch over (data, fsdp), sequence over seq, in any layout.
      w_DV: laid out by `lcx.sharding.parameter_spec("DV")`; gathered over (fsdp, seq) once, before the loop over chunks.
      mesh: the device mesh.
      chunk: tokens of one device whose logits exist at a time.
      z_loss, label_smoothing, softcap, per_token, implementation: as in `ops`.

    Returns:
      sum_loss, sum_weight: fp32 scalars over all tokens of the mesh; with `per_token`, nll_BS and correct_BS too.

    Raises:
      UserError: a dimension that its mesh axes do not divide, or as in `ops`.
    """
    local.check(x_BSD, w_DV, labels_BS, weights_BS, local.LossSpec(chunk, z_loss, label_smoothing, softcap))
    (B, S, D), V = x_BSD.shape, w_DV.shape[1]
    for name, size, axes in (("B", B, BATCH_AXES), ("S", S, ("seq",)), ("D", D, ("fsdp", "seq")), ("V", V, ("tensor",))):
        _divide(name, size, axes, mesh)
    shards = mesh.shape["tensor"]
    vocabulary: Any = VocabularyShards("tensor", shards) if shards > 1 else local.WholeVocabulary()
    options = dict(chunk=chunk, z_loss=z_loss, label_smoothing=label_smoothing, softcap=softcap, per_token=per_token)

    def per_device(x_bsD, w_dv, labels_bs, weights_bs):
        w_Dv = gather(w_dv, "DV", x_bsD.dtype, mesh)
        sum_loss, sum_weight, *tokens = local.linear_cross_entropy(
            x_bsD, w_Dv, labels_bs, weights_bs, vocabulary=vocabulary, implementation=implementation, **options
        )
        return lax.psum(sum_loss, TOKEN_AXES), lax.psum(sum_weight, TOKEN_AXES), *tokens

    tokens_spec = activation_spec("BS")
    run = per_shard(
        per_device,
        mesh=mesh,
        in_specs=(activation_spec("BSD"), parameter_spec("DV"), tokens_spec, tokens_spec),
        out_specs=(PartitionSpec(), PartitionSpec(), *([tokens_spec] * 2 if per_token else [])),
    )
    return run(x_BSD, w_DV, labels_BS, weights_BS.astype(jnp.float32))


def _divide(name: str, size: int, axes: tuple[str, ...], mesh: Mesh) -> None:
    count = 1
    for axis in axes:
        count *= mesh.shape[axis]
    if size % count:
        what = " * ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)
        raise UserError(f"linear_cross_entropy: {name}={size} cannot be divided among mesh axes {what}")
