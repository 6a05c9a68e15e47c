"""Layouts: who holds which token, and that converting moves every token and every gradient to the right place."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from lcx.parallel import cyclic, layouts
from lcx.parallel.layouts import LAYOUTS, convert, local_runs, sequence_permutation, shard_multiple
from lcx.registry import UserError
from lcx.sharding import activation_spec

shapes = given(layout=st.sampled_from(LAYOUTS), shards=st.integers(1, 9), multiple=st.integers(1, 4))


def _placed(x, mesh, dims="BS"):
    spec = PartitionSpec(*activation_spec(dims), *[None] * (x.ndim - len(dims)))
    return jax.device_put(x, NamedSharding(mesh, spec))


@shapes
@settings(max_examples=40, deadline=None)
def test_runs_and_permutation_say_the_same(layout, shards, multiple):
    length = multiple * shard_multiple(layout, shards)
    held = [np.asarray(local_runs(layout, length, shards, rank).order()) for rank in range(shards)]
    index = sequence_permutation(layout, length, shards)
    assert (np.concatenate(held) == index).all()
    assert (np.sort(index) == np.arange(length)).all()


@shapes
@settings(max_examples=40, deadline=None)
def test_bounds_are_those_of_the_runs(layout, shards, multiple):
    length = multiple * shard_multiple(layout, shards)
    first, last = layouts.run_bounds(layout, length, shards)
    for rank in range(shards):
        runs = local_runs(layout, length, shards, rank)
        order = np.asarray(runs.order()).reshape(runs.count, runs.length)
        assert (first[rank] == order[:, 0]).all() and (last[rank] == order[:, -1]).all()


@given(layout=st.sampled_from(LAYOUTS), shards=st.integers(1, 9), length=st.integers(1, 200))
@settings(max_examples=60, deadline=None)
def test_any_length_has_a_permutation(layout, shards, length):
    """Every token once, and in the order in which the padded row holds them."""
    index = sequence_permutation(layout, length, shards)
    assert (np.sort(index) == np.arange(length)).all()
    padded = sequence_permutation(layout, layouts.padded_length(layout, length, shards), shards)
    assert (padded[padded < length] == index).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shards", [1, 2, 5])
def test_gathered_slices_to_order_and_back(layout, shards):
    length = 3 * shard_multiple(layout, shards)
    gathered = jnp.asarray(sequence_permutation(layout, length, shards))[None, :, None]
    ordered = layouts.gathered_to_contiguous(gathered, layout, shards)
    assert (ordered[0, :, 0] == jnp.arange(length)).all()
    assert (layouts.contiguous_to_gathered(ordered, layout, shards) == gathered).all()


@pytest.mark.parametrize(
    "sizes", [dict(seq=4), dict(seq=3, data=2), dict(seq=2, fsdp=2, tensor=2), dict(seq=8), dict(seq=1)], ids=str
)
def test_convert_between_all_layouts(mesh_of, sizes):
    """Values against the permutation, and the gradient against its transpose."""
    mesh = mesh_of(**sizes)
    shards = mesh.shape["seq"]
    length = 2 * np.lcm.reduce([shard_multiple(layout, shards) for layout in LAYOUTS])
    x = np.random.default_rng(0).normal(size=(4, length, 2)).astype(np.float32)

    def run(x, weight, pair):
        value, pull = jax.vjp(lambda x: convert(x, *pair, mesh=mesh), x)
        return value, pull(weight)[0]

    run = jax.jit(run, static_argnums=2)
    for source in LAYOUTS:
        for target in LAYOUTS:
            a, b = (sequence_permutation(layout, length, shards) for layout in (source, target))
            weight = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
            value, grad = run(_placed(x[:, a], mesh), _placed(weight[:, b], mesh), (source, target))
            assert (np.asarray(value) == x[:, b]).all(), (source, target)
            assert (np.asarray(grad) == weight[:, a]).all(), (source, target)


@pytest.mark.parametrize(
    "shape,dim,dims", [((2, 16), 1, "BS"), ((2, 3, 16), 2, "BRS"), ((2, 16, 4, 3), 1, "BSHK"), ((2, 4, 16), 2, "BHS")]
)
def test_convert_any_rank_keeps_other_dims_in_place(mesh_of, shape, dim, dims):
    """A dimension over tensor stays there: nothing is gathered."""
    mesh = mesh_of(seq=2, data=2, tensor=2)
    x = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    placed = _placed(x, mesh, dims)
    moved = jax.jit(lambda x: convert(x, "contiguous", "zigzag", mesh=mesh, dim=dim)).lower(placed).compile()
    assert "all-gather" not in moved.as_text()
    index = sequence_permutation("zigzag", shape[dim], 2)
    assert (np.asarray(moved(placed)) == np.take(x, index, axis=dim)).all()


def test_zigzag_is_two_permutes_of_half_a_shard(mesh_of):
    mesh = mesh_of(seq=4)
    x = _placed(np.zeros((1, 64, 8), np.float32), mesh)
    text = jax.jit(lambda x: convert(x, "contiguous", "zigzag", mesh=mesh)).lower(x).compile().as_text()
    assert len(re.findall(r"= f32\[1,8,8\]\S* collective-permute", text)) == 2
    assert not re.search(r"all-gather|all-to-all|all-reduce", text)


@pytest.mark.parametrize(
    "shards,tokens,block,blocks", [(8, 32, 8, 4), (8, 8, 1, 8), (4, 32, 4, 8), (2, 32, 2, 16), (6, 12, 4, 3), (3, 35, 4, 1)]
)
def test_cyclic_blocks_come_from_and_return_to_where_they_belong(mesh_of, monkeypatch, shards, tokens, block, blocks):
    """Fewer blocks than devices, as many, and more; and none but the whole shard where nothing else divides."""
    monkeypatch.setattr(cyclic, "BLOCK", block)
    assert cyclic.blocks_of(tokens, shards) == blocks
    mesh, length = mesh_of(seq=shards), shards * tokens
    index = sequence_permutation("cyclic", length, shards)
    x = np.arange(length, dtype=np.int32)[None]
    there = jax.jit(lambda x: convert(x, "contiguous", "cyclic", mesh=mesh))(_placed(x, mesh))
    assert (np.asarray(there) == x[:, index]).all()
    back = jax.jit(lambda x: convert(x, "cyclic", "contiguous", mesh=mesh))(there)
    assert (np.asarray(back) == x).all()
    runs = local_runs("cyclic", length, shards, 1)
    assert runs.count == blocks and (np.asarray(runs.order()) == index[tokens : 2 * tokens]).all()


def test_striped_is_one_all_to_all(mesh_of):
    mesh = mesh_of(seq=4)
    x = _placed(np.zeros((1, 64, 8), np.float32), mesh)
    for pair in (("contiguous", "striped"), ("striped", "contiguous")):
        text = jax.jit(lambda x, pair=pair: convert(x, *pair, mesh=mesh)).lower(x).compile().as_text()
        assert len(re.findall(r" all-to-all\(", text)) == 1 and not re.search(r"all-gather|collective-permute|all-reduce", text)


def test_errors_are_one_line_and_name_the_choices(mesh_of):
    mesh = mesh_of(seq=4, data=2)
    x = jnp.zeros((2, 64))
    for call, parts in [
        (lambda: convert(x, "contiguous", "zigzg", mesh=mesh), ("zigzag", "striped")),
        (lambda: convert(x[:, :60], "contiguous", "zigzag", mesh=mesh), ("60", "multiple of 8")),
        (lambda: convert(x[:, :40], "striped", "contiguous", mesh=mesh), ("40", "multiple of 16")),
        (lambda: convert(x[:1], "contiguous", "zigzag", mesh=mesh), ("data*fsdp=2",)),
        (lambda: convert(x, "contiguous", "zigzag", mesh=mesh, dim=2), ("dim=2",)),
        (lambda: local_runs("zigzag", 12, 4, 0), ("12", "multiple of 8")),
        (lambda: shard_multiple("ring", 4), ("contiguous",)),
    ]:
        with pytest.raises(UserError) as error:
            call()
        assert "\n" not in str(error.value) and all(part in str(error.value) for part in parts), error.value
