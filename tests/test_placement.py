"""Which chip of a slice stands where in the mesh: rings go from neighbour to neighbour."""

import itertools
import math

import jax
import pytest

from lcx.mesh import make_mesh
from lcx.placement import closed_walk, closes, ring_order, snake


class Chip:
    """A device that knows where it is."""

    def __init__(self, *coords, slice_index=0, platform="tpu"):
        self.coords, self.slice_index, self.platform = coords, slice_index, platform


def chips(X, Y, Z=1, **options):
    """In the order in which JAX numbers them."""
    return [Chip(x, y, z, **options) for z in range(Z) for y in range(Y) for x in range(X)]


def hops(ring) -> list[int]:
    """Links that each transfer of a ring crosses."""
    return [sum(abs(a - b) for a, b in zip(here, there)) for here, there in zip(ring, [*ring[1:], ring[0]])]


BOXES = [box for box in itertools.product(range(1, 6), range(1, 6), range(1, 5)) if math.prod(box) > 1]


def test_walks_visit_everything_once_and_close_where_they_can():
    for box in BOXES:
        walk = closed_walk(box)
        assert sorted(walk) == sorted(snake(box)) == sorted(itertools.product(*map(range, box)))
        assert max(hops(snake(box))[:-1]) == 1
        if closes(box):
            assert max(hops(walk)) == 1
        elif max(box) == len(walk):
            assert max(hops(walk)) == 2  # a line, folded


@pytest.mark.parametrize(
    "box,seq,tensor",
    [
        ((2, 4), 8, 1),
        ((8, 8), 64, 1),
        ((8, 8), 8, 1),
        ((16, 16), 256, 1),
        ((16, 16), 16, 1),
        ((2, 2, 2), 8, 1),
        ((4, 4, 4), 64, 1),
        ((4, 4, 4), 16, 1),
        ((8, 8, 16), 1024, 1),
    ],
)
def test_every_ring_of_a_slice_goes_from_neighbour_to_neighbour(box, seq, tensor):
    given = chips(*box)
    found = ring_order(given, seq, tensor)
    assert set(found) == set(given) and len(found) == len(given)
    for start in range(0, len(found), seq):
        assert set(hops([chip.coords for chip in found[start : start + seq]])) == {1}
    assert max(hops([chip.coords for chip in given])) > 1  # as they are numbered they do not


def test_tensor_shards_are_neighbours_and_the_ring_steps_over_them():
    found = [chip.coords for chip in ring_order(chips(8, 8), seq=16, tensor=4)]
    shards = [found[n : n + 4] for n in range(0, 64, 4)]
    assert all(set(hops(shard)) == {1} for shard in shards)
    assert set(hops([shard[0] for shard in shards])) == {2}


def test_slices_are_filled_one_after_another():
    found = ring_order(chips(2, 2, slice_index=1) + chips(2, 2, slice_index=0), seq=4, tensor=1)
    assert [chip.slice_index for chip in found] == [1] * 4 + [0] * 4
    for half in (found[:4], found[4:]):
        assert set(hops([chip.coords for chip in half])) == {1}


@pytest.mark.parametrize(
    "given,seq,tensor",
    [
        (chips(2, 4)[:-1], 7, 1),  # no box
        (chips(2, 2) + chips(2, 2), 8, 1),  # two cores in one place
        (chips(2, 4), 1, 3),
        (chips(4, 4), 3, 1),
        (jax.devices()[:8], 4, 2),
        (chips(1, 1, 8, platform="gpu"), 8, 1),
    ],
)
def test_gpus_and_devices_that_fill_no_box_stay_in_order(given, seq, tensor):
    assert ring_order(given, seq, tensor) == given


def test_a_mesh_is_placed():
    given = chips(2, 4)
    assert list(make_mesh(seq=8, devices=given).devices.flat) == ring_order(given, 8, 1) != given
