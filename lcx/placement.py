"""Which device stands where in the mesh, so that neighbours in the ring along `seq` are neighbours on the wire.

The chips of a TPU slice stand in a box and are wired to their neighbours. JAX numbers them row by row, and a ring in that order
has hops across the whole slice: over v5e slices the compiler turns those into transfers that nothing overlaps. Here every ring
is a closed walk from chip to neighbouring chip wherever there is one; a line without an end to return by is folded, so that
no hop is longer than two.
"""

import itertools
import math
from collections.abc import Sequence

import jax

Shape = tuple[int, int, int]


def ring_order(devices: Sequence[jax.Device], seq: int, tensor: int) -> list[jax.Device]:
    """The devices ordered for a mesh (..., seq, tensor).

    Devices that say nothing about where they are, or that fill no box that the axes divide, stay as they are. So do GPUs: what
    they give as coordinates is their number, they hang on a switch, and XLA supports no other order.

    Args:
      devices: of one or several slices.
      seq, tensor: sizes of the two innermost axes.
    """
    if any(device.platform == "gpu" for device in devices):
        return list(devices)
    slices: dict[int, list[jax.Device]] = {}
    for device in devices:
        slices.setdefault(getattr(device, "slice_index", 0), []).append(device)
    ordered = [_in_slice(chips, seq, tensor) for chips in slices.values()]
    return list(devices) if None in ordered else [device for chips in ordered for device in chips]


def _in_slice(chips: list[jax.Device], seq: int, tensor: int) -> list[jax.Device] | None:
    at = {tuple(chip.coords): chip for chip in chips if getattr(chip, "coords", None) is not None}
    if len(at) != len(chips):  # no coordinates, or two cores with the same
        return None
    low = [min(place[dim] for place in at) for dim in range(3)]
    box = tuple(1 + max(place[dim] for place in at) - low[dim] for dim in range(3))
    if math.prod(box) != len(at):
        return None
    shard = compact(tensor, box)
    ring = shard and compact(seq, _over(box, shard))
    if not ring:
        return None
    rings = _over(_over(box, shard), ring)
    place = lambda o, r, i: tuple(low[dim] + (o[dim] * ring[dim] + r[dim]) * shard[dim] + i[dim] for dim in range(3))
    return [at[place(o, r, i)] for o in snake(rings) for r in closed_walk(ring) for i in snake(shard)]


def _over(box: Shape, part: Shape) -> Shape:
    return tuple(n // m for n, m in zip(box, part, strict=True))


def compact(count: int, box: Shape) -> Shape | None:
    """The shape of `count` chips whose copies fill a box: one with a closed walk before others, then the least elongated."""
    divisors = ([n for n in range(1, size + 1) if size % n == 0] for size in box)
    shapes = [shape for shape in itertools.product(*divisors) if math.prod(shape) == count]
    return min(shapes, key=lambda shape: (not closes(shape), max(shape)), default=None)


def closes(shape: Shape) -> bool:
    """Whether some walk through the box visits every chip once, goes from neighbour to neighbour, and ends beside its start."""
    return math.prod(shape) <= 2 or (math.prod(shape) % 2 == 0 and sum(size > 1 for size in shape) > 1)


def snake(shape: Shape) -> list[Shape]:
    """Every place in a box, each a neighbour of the next."""
    places = [()]
    for size in reversed(shape):
        places = [(n, *rest) for n in range(size) for rest in (places[::-1] if n % 2 else places)]
    return places


def closed_walk(shape: Shape) -> list[Shape]:
    """Every place in a box, each a neighbour of the next and the last of the first where `closes`; else two apart in a line, and
    in a box of odd sides, which has no closed walk, with one long way back.

    In a plane: along one edge, and back in a snake through all other columns. A box is a plane whose columns are snakes.
    """
    wide = [dim for dim in range(3) if shape[dim] > 1]
    if len(wide) < 2:
        line = [*range(0, max(shape), 2), *reversed(range(1, max(shape), 2))]
        return [tuple(n if dim in wide else 0 for dim in range(3)) for n in line]
    across = next((dim for dim in wide if shape[dim] % 2 == 0), None)
    if across is None:
        return snake(shape)
    flat = tuple(1 if dim == across else size for dim, size in enumerate(shape))
    column = [place[:across] + place[across + 1 :] for place in snake(flat)]
    X, Y = shape[across], len(column)
    back = [(x, y) for x in reversed(range(X)) for y in (range(1, Y) if x % 2 else range(Y - 1, 0, -1))]
    return [(*column[y][:across], x, *column[y][across:]) for x, y in [(x, 0) for x in range(X)] + back]
