"""Layouts: which tokens of a row each device along `seq` holds, and moving arrays from one layout to another.

With P devices, a row of S tokens is spread as

    contiguous: device r holds tokens r S/P ... (r + 1) S/P - 1.
    zigzag: the row is cut into 2P chunks and device r holds chunks r and 2P - 1 - r, so that under a causal mask every device
        has the same work (Megatron's and ring-flash-attention's balancing).
    striped: device r holds tokens r, r + P, r + 2P, ... (Brandon et al., "Striped Attention", arXiv 2311.09431).
    cyclic: device r holds blocks r, r + P, r + 2P, ... of some hundred tokens: for rows of many documents; see `cyclic`.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from lcx.mesh import BATCH_AXES
from lcx.ops.types import Runs
from lcx.parallel import cyclic
from lcx.registry import UserError, unknown
from lcx.sharding import per_shard

LAYOUTS = ("contiguous", "zigzag", "striped", "cyclic")


def check_layout(layout: str) -> None:
    """Raises a UserError for a name that is not in `LAYOUTS`."""
    if layout not in LAYOUTS:
        raise unknown("layout", layout, LAYOUTS)


def shard_multiple(layout: str, shards: int) -> int:
    """What a length must be a multiple of to stand in `layout` on `shards` devices.

    A striped device exchanges as many tokens with each other device, hence the square.
    """
    check_layout(layout)
    if shards == 1:
        return 1
    return {"contiguous": shards, "zigzag": 2 * shards, "striped": shards * shards, "cyclic": shards}[layout]


def local_runs(layout: str, length: int, shards: int, rank: int | jax.Array) -> Runs:
    """The order of the tokens that device `rank` holds of a row of `length` tokens.

    Args:
      layout: a name from `LAYOUTS`.
      length: tokens of the whole row, padding included.
      shards: devices along the sequence.
      rank: this device's index along the sequence; may be traced.

    Raises:
      UserError: a length that is not a multiple of `shards` (zigzag: of 2 * shards).
    """
    check_layout(layout)
    _divisible("length", length, 2 * shards if layout == "zigzag" and shards > 1 else shards, layout, shards)
    starts, step = _run_starts(layout, length, shards, rank)
    starts = jnp.stack([jnp.asarray(start, jnp.int32) for start in starts])
    return Runs(starts, length // (shards * len(starts)), step)


def _run_starts(layout, length, shards, rank):
    """(start of each run, step); `rank` may be an int, a numpy array or traced."""
    if shards == 1 or layout == "contiguous":
        return (rank * (length // shards),), 1
    if layout == "zigzag":
        chunk = length // (2 * shards)
        return (rank * chunk, (2 * shards - 1 - rank) * chunk), 1
    if layout == "cyclic":
        blocks = cyclic.blocks_of(length // shards, shards)
        return tuple((rank + shards * n) * (length // (shards * blocks)) for n in range(blocks)), 1
    return (rank,), shards


def run_bounds(layout: str, length: int, shards: int) -> tuple[np.ndarray, np.ndarray]:
    """(first, last) order of every run of every device, both int64 of shape (shards, runs). Static."""
    check_layout(layout)
    starts, step = _run_starts(layout, length, shards, np.arange(shards, dtype=np.int64))
    first = np.stack(starts, axis=1)
    return first, first + step * (length // (shards * len(starts)) - 1)


def sequence_permutation(layout: str, length: int, shards: int) -> np.ndarray:
    """index_S with x_in_layout = x_contiguous[:, index_S]; int32.

    A length that does not divide is permuted as the padded one, and the padding left out.
    """
    padded = padded_length(layout, length, shards)
    order = np.arange(padded, dtype=np.int32)
    if shards > 1 and layout == "zigzag":
        chunks = order.reshape(2 * shards, -1)
        order = np.stack([chunks[:shards], chunks[: shards - 1 : -1]], axis=1).reshape(-1)
    elif layout == "striped":
        order = order.reshape(-1, shards).T.reshape(-1)
    elif shards > 1 and layout == "cyclic":
        blocks = cyclic.blocks_of(padded // shards, shards)
        order = order.reshape(blocks, shards, -1).swapaxes(0, 1).reshape(-1)
    return order[order < length]


def padded_length(layout: str, length: int, shards: int) -> int:
    """The length rounded up to `shard_multiple`."""
    multiple = shard_multiple(layout, shards)
    return -(-length // multiple) * multiple


def convert(x: jax.Array, from_layout: str, to_layout: str, *, mesh: Mesh, dim: int = 1) -> jax.Array:
    """The same tokens in another layout; differentiable.

    contiguous <-> zigzag is two permutes of half a shard, contiguous <-> striped one all-to-all, contiguous <-> cyclic one
    all-to-all or a permute for each block of a device; others go via contiguous. Nothing is gathered and no device holds more
    than its share.

    Args:
      x: array of rank >= 2, batch over (data, fsdp) in dimension 0, tokens over seq in dimension `dim`; the other
        dimensions stay as they are, spread over tensor or not.
      from_layout, to_layout: names from `LAYOUTS`.
      mesh: the device mesh.
      dim: the dimension of the tokens, at least 1.

    Raises:
      UserError: an unknown layout, or a size that its mesh axes do not divide.
    """
    for layout in (from_layout, to_layout):
        check_layout(layout)
    if not 1 <= dim < x.ndim:
        raise UserError(f"convert: dim={dim} must be between 1 and {x.ndim - 1} for an array of shape {x.shape}")
    shards = mesh.shape["seq"]
    if from_layout == to_layout or shards == 1:
        return x
    for layout in (from_layout, to_layout):
        _divisible(f"dim {dim} of shape {x.shape}", x.shape[dim], shard_multiple(layout, shards), layout, shards)
    rows = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if x.shape[0] % rows:
        raise UserError(f"convert: dim 0 of shape {x.shape} must be a multiple of data*fsdp={rows}")
    spec = PartitionSpec(BATCH_AXES, *[None] * (dim - 1), "seq")
    moved = lambda x: local_convert(x, from_layout, to_layout, shards=shards, dim=dim)
    return per_shard(moved, mesh=mesh, in_specs=spec, out_specs=spec, form="tokenwise")(x)


def local_convert(x: jax.Array, from_layout: str, to_layout: str, *, shards: int, dim: int = 1) -> jax.Array:
    """`convert` on a device's own slice, inside `per_shard`."""
    if from_layout == to_layout or shards == 1:
        return x
    if from_layout != "contiguous":
        x = _TO_CONTIGUOUS[from_layout](x, shards, dim)
    return x if to_layout == "contiguous" else _FROM_CONTIGUOUS[to_layout](x, shards, dim)


def gathered_to_contiguous(x: jax.Array, layout: str, shards: int, dim: int = 1) -> jax.Array:
    """The slices of all devices, one after another in dimension `dim`, -> the tokens in order. Reshapes, no communication."""
    check_layout(layout)
    if layout == "contiguous" or shards == 1:
        return x
    if layout == "striped":
        return jnp.swapaxes(_cut(x, dim, shards, -1), dim, dim + 1).reshape(x.shape)
    if layout == "cyclic":
        blocks = cyclic.blocks_of(x.shape[dim] // shards, shards)
        return jnp.swapaxes(_cut(x, dim, shards, blocks, -1), dim, dim + 1).reshape(x.shape)
    low, high = jnp.unstack(_cut(x, dim, shards, 2, -1), axis=dim + 1)
    return jnp.concatenate([low, jnp.flip(high, dim)], axis=dim).reshape(x.shape)


def contiguous_to_gathered(x: jax.Array, layout: str, shards: int, dim: int = 1) -> jax.Array:
    """The inverse of `gathered_to_contiguous`."""
    check_layout(layout)
    if layout == "contiguous" or shards == 1:
        return x
    if layout == "striped":
        return jnp.swapaxes(_cut(x, dim, -1, shards), dim, dim + 1).reshape(x.shape)
    if layout == "cyclic":
        blocks = cyclic.blocks_of(x.shape[dim] // shards, shards)
        return jnp.swapaxes(_cut(x, dim, blocks, shards, -1), dim, dim + 1).reshape(x.shape)
    low, high = jnp.unstack(_cut(x, dim, 2, shards, -1), axis=dim)
    return jnp.stack([low, jnp.flip(high, dim)], axis=dim + 1).reshape(x.shape)


def _cut(x: jax.Array, dim: int, *sizes: int) -> jax.Array:
    """Dimension `dim` as several."""
    return x.reshape(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])


def _permutes(shards: int) -> list[list[tuple[int, int]]]:
    """Where the even and the odd chunk of each contiguous shard live in zigzag; each is a permutation of the devices."""
    owner = lambda chunk: min(chunk, 2 * shards - 1 - chunk)
    return [[(rank, owner(2 * rank + odd)) for rank in range(shards)] for odd in (0, 1)]


def _swap_on_odd_devices(first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(low, high) chunk <-> (even, odd) chunk: device r's low chunk is chunk r."""
    even = lax.axis_index("seq") % 2 == 0
    return lax.select(even, first, second), lax.select(even, second, first)


def _contiguous_to_zigzag(x, shards, dim):
    chunks = jnp.split(x, 2, axis=dim)
    even, odd = (lax.ppermute(chunk, "seq", pairs) for chunk, pairs in zip(chunks, _permutes(shards), strict=True))
    return jnp.concatenate(_swap_on_odd_devices(even, odd), axis=dim)


def _zigzag_to_contiguous(x, shards, dim):
    chunks = _swap_on_odd_devices(*jnp.split(x, 2, axis=dim))
    back = [[(there, here) for here, there in pairs] for pairs in _permutes(shards)]
    return jnp.concatenate([lax.ppermute(chunk, "seq", pairs) for chunk, pairs in zip(chunks, back, strict=True)], axis=dim)


def _contiguous_to_striped(x, shards, dim):
    # A shard starts at a multiple of P, so its token s goes to device s % P.
    parts = _cut(x, dim, -1, shards)
    return lax.all_to_all(parts, "seq", split_axis=dim + 1, concat_axis=dim, tiled=True).reshape(x.shape)


def _striped_to_contiguous(x, shards, dim):
    parts = _cut(x, dim, shards, -1, 1)
    return lax.all_to_all(parts, "seq", split_axis=dim, concat_axis=dim + 2, tiled=True).reshape(x.shape)


_TO_CONTIGUOUS: dict[str, Callable] = {
    "zigzag": _zigzag_to_contiguous,
    "striped": _striped_to_contiguous,
    "cyclic": cyclic.to_contiguous,
}
_FROM_CONTIGUOUS: dict[str, Callable] = {
    "zigzag": _contiguous_to_zigzag,
    "striped": _contiguous_to_striped,
    "cyclic": cyclic.from_contiguous,
}


def _divisible(what: str, length: int, multiple: int, layout: str, shards: int) -> None:
    if length % multiple:
        raise UserError(f"layout={layout!r}: {what} is {length} tokens; on seq={shards} it must be a multiple of {multiple}")
