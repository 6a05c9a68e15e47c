"""Attention over a mesh: every strategy and layout against the reference on whole arrays, values and gradients by name."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.ops.types import Mask
from lcx.parallel import STRATEGIES, cyclic, layouts, passes, route
from lcx.parallel import attention as attention_over_mesh
from lcx.parallel.attention import context_attention
from lcx.parallel.layouts import LAYOUTS, sequence_permutation
from lcx.registry import UserError
from pallas_kernels import attention_tpu, interpret
from tests.contracts.context_attention_cases import CASES, Case, Sharded, assert_equal_to_whole, options_of, place


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_equal_to_whole(mesh_of, case, strategy):
    """In zigzag order on four devices."""
    assert_equal_to_whole(case, Sharded(case, mesh_of(seq=4), strategy, "zigzag", **options_of(strategy)))


# Each case differs from "everything" in what it leaves out; the rest of the product is for `make test-slow`.
ALWAYS = {(strategy, name) for strategy in STRATEGIES for name in ("two_sided_window", "everything")}
ALWAYS |= {("ring", "causal"), ("ring", "sink_tokens")}
IN_LAYOUTS = [
    pytest.param(strategy, name, marks=[] if (strategy, name) in ALWAYS else pytest.mark.slow)
    for strategy in STRATEGIES
    for name in CASES
]


@pytest.mark.parametrize("layout", ["contiguous", "striped"])
@pytest.mark.parametrize("strategy,name", IN_LAYOUTS)
def test_equal_to_whole_in_other_layouts(mesh_of, strategy, name, layout):
    options = {} if layout == "striped" else options_of(strategy)
    assert_equal_to_whole(CASES[name], Sharded(CASES[name], mesh_of(seq=4), strategy, layout, **options))


@pytest.mark.parametrize(("strategy", "name"), [("ring", "causal"), ("ring", "everything"), ("ulysses", "window")])
def test_equal_to_whole_in_cyclic_order(mesh_of, monkeypatch, strategy, name):
    """In blocks of four tokens, four to a device."""
    monkeypatch.setattr(cyclic, "BLOCK", 4)
    case = dataclasses.replace(CASES[name], length=64)
    assert_equal_to_whole(case, Sharded(case, mesh_of(seq=4), strategy, "cyclic"))


@pytest.mark.parametrize(("strategy", "layout"), [("ring", "cyclic"), ("ulysses_ring", "contiguous")])
def test_equal_to_whole_with_sinks_that_are_fetched_apart(mesh_of, monkeypatch, strategy, layout):
    """In cyclic order, and by groups of two devices of which every second holds the same part of the heads."""
    monkeypatch.setattr(cyclic, "BLOCK", 4)
    case = CASES["sink_tokens"]
    assert_equal_to_whole(case, Sharded(case, mesh_of(seq=8), strategy, layout, **options_of(strategy)))


@pytest.mark.parametrize(("strategy", "kv_heads"), [("ring", 4), ("ulysses", 8), ("allgather", 2)])
def test_equal_to_whole_a_few_heads_at_a_time(mesh_of, monkeypatch, strategy, kv_heads):
    """As many passes as the key/value heads and the strategy allow."""
    monkeypatch.setattr(passes, "PAIRS", 1)
    case = dataclasses.replace(CASES["everything"], heads=(8, kv_heads))
    made, real = [], passes.in_passes
    monkeypatch.setattr(attention_over_mesh, "in_passes", lambda fn, n, *rest: made.append(n) or real(fn, n, *rest))
    assert_equal_to_whole(case, Sharded(case, mesh_of(seq=4), strategy, "zigzag"))
    assert set(made) == {2 if strategy == "ulysses" else kv_heads}


@pytest.mark.parametrize(("name", "devices"), [("everything", 4), ("full", 5), ("odd_length", 3)])
def test_equal_to_whole_with_half_of_the_heads_each_way(mesh_of, monkeypatch, name, devices):
    monkeypatch.setattr(route, "both_ways", lambda tokens: True)
    assert_equal_to_whole(CASES[name], Sharded(CASES[name], mesh_of(seq=devices), "ring", "zigzag"))


@pytest.mark.parametrize("tokens", [1, 3])
def test_equal_to_whole_with_few_tokens_a_device(mesh_of, tokens):
    """One token cannot be divided into the halves that hide the backward ring's first and last transfer."""
    case = Case(length=4 * tokens, heads=(2, 1))
    assert_equal_to_whole(case, Sharded(case, mesh_of(seq=4), "ring", "contiguous"))


def test_passes_do_not_change_what_ulysses_sends(mesh_of, monkeypatch):
    """The groups are as large as all heads allow, and no key/value head goes to more devices than without passes."""
    monkeypatch.setattr(passes, "PAIRS", 1)
    made, real = [], passes.in_passes
    monkeypatch.setattr(attention_over_mesh, "in_passes", lambda fn, n, *rest: made.append((n, fn.args[0])) or real(fn, n, *rest))
    for heads, expected in (((8, 8), (1, 8)), ((16, 16), (2, 8)), ((8, 2), (1, 8))):
        q, k = (jax.ShapeDtypeStruct((1, 64, h, 8), jnp.float32) for h in heads)
        made.clear()
        jax.eval_shape(functools.partial(context_attention, mesh=mesh_of(seq=8), strategy="ulysses_ring", mask=Mask()), q, k, k)
        assert {(n, plan.ulysses_degree) for n, plan in made} == {expected}


def test_how_many_passes():
    """One where there is little to do; with a window, more tokens make as little; never a head in two parts."""
    anything = lambda n: True
    assert passes.head_passes(Mask(), 2**13, 32, 8, anything) == 2
    assert passes.head_passes(Mask(), 2**14, 32, 8, anything) == 8
    assert passes.head_passes(Mask(), 2**11, 32, 8, anything) == 1
    assert passes.head_passes(Mask(window=(2**11 - 1, 0)), 2**14, 32, 8, anything) == 1
    assert passes.head_passes(Mask(), 2**20, 32, 8, lambda n: n <= 4) == 4


@pytest.mark.parametrize(("strategy", "devices"), [("ring", 2), pytest.param("ulysses_ring", 4, marks=pytest.mark.slow)])
def test_equal_to_whole_with_the_tpu_kernel(mesh_of, monkeypatch, strategy, devices):
    """Interpreted: one kernel for every step of the ring, told by traced starts what it sees."""
    monkeypatch.setattr(attention_tpu, "tile_sizes", lambda dtype: (8, 8))
    monkeypatch.setattr(attention_tpu, "LANES", 8)
    monkeypatch.setattr(attention_tpu, "HEAD_WIDTHS", (8,))
    monkeypatch.setattr(attention_over_mesh, "CHECKED", False)
    case = CASES["everything"]
    with interpret.interpreted():
        sharded = Sharded(case, mesh_of(seq=devices), strategy, "zigzag", implementation="mosaic_tpu", **options_of(strategy))
        assert_equal_to_whole(case, sharded)


MESHES = [
    ("ring", dict(seq=2), "zigzag"),
    ("ring", dict(data=2, seq=3, tensor=2), "zigzag"),
    ("ring", dict(seq=1, fsdp=2, tensor=2), "zigzag"),
    ("ulysses", dict(data=2, seq=2, tensor=2), "zigzag"),
    ("ulysses", dict(seq=1, data=2), "striped"),
    ("ulysses_ring", dict(seq=8), "zigzag"),
    ("ulysses_ring", dict(seq=8), "contiguous"),
    ("ulysses_ring", dict(seq=4, tensor=2), "zigzag"),
    ("allgather", dict(data=2, fsdp=2, seq=2, tensor=2), "contiguous"),
]


@pytest.mark.parametrize("strategy,sizes,layout", MESHES, ids=str)
def test_equal_to_whole_on_any_mesh(mesh_of, strategy, sizes, layout):
    """Documents, a window and sinks, batch and heads spread too; ulysses_ring in the groups that it chooses itself."""
    case = dataclasses.replace(CASES["everything"], rows=4, length=64, heads=(8, 2))
    assert_equal_to_whole(case, Sharded(case, mesh_of(**sizes), strategy, layout))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_forward_alone_gives_the_same_values(mesh_of, strategy):
    """Differentiating must not choose another computation."""
    case, mesh = CASES["sink_logits_gqa"], mesh_of(seq=4)
    index = sequence_permutation("zigzag", case.length, 4)
    q, k, v = (place(name, case.arrays()[name], mesh, index) for name in "qkv")
    attend = functools.partial(context_attention, mesh=mesh, strategy=strategy, mask=case.mask, **options_of(strategy))
    alone = jax.jit(attend)(q, k, v)
    primal = jax.jit(lambda *x: jax.vjp(attend, *x)[0])(q, k, v)
    assert (np.asarray(alone) == np.asarray(primal)).all()


# What is refused.


def test_errors_are_one_line_and_name_the_choices(mesh_of):
    mesh = mesh_of(seq=4, tensor=2)
    q, k = jnp.zeros((2, 64, 4, 8)), jnp.zeros((2, 64, 2, 8))
    attend = functools.partial(context_attention, mesh=mesh, mask=Mask())
    for call, parts in [
        (lambda: attend(q, k, k, strategy="rng"), ("did you mean 'ring'", "ulysses")),
        (lambda: attend(q, k, k, strategy="ulysses"), ("groups of 4", "H=2", "G=1", "1, 2", "strategies that can: ring")),
        (lambda: attend(q, k, k, strategy="ulysses_ring", ulysses_degree=3), ("groups of 3", "1, 2")),
        (lambda: attend(q, k, k, strategy="ulysses_ring", layout="striped"), ("striped", "strategies that can: ring, allgather")),
        (lambda: attend(q, k, k, strategy="ring", ulysses_degree=2), ("ulysses_degree=2", "ulysses_ring")),
        (lambda: attend(q, k, k, axis="data"), ("axis='data'", "'seq'")),
        (lambda: attend(q, k, k, layout="zig"), ("zigzag",)),
        (lambda: attend(q[:, :, :3], k[:, :, :1], k[:, :, :1]), ("H=3", "tensor=2")),
        (lambda: attend(q, k[:, :, :1], k[:, :, :1]), ("G=1", "tensor=2")),
        (lambda: attend(q, k[:, :32], k[:, :32]), ("T=S=64",)),
        (lambda: context_attention(q[:1], k[:1], k[:1], mesh=mesh_of(data=2), mask=Mask()), ("B=1", "data*fsdp=2")),
        (lambda: attend(q, k, k, segments_BS=jnp.zeros((2, 64))), ("segments_BS", "int")),
        (lambda: attend(q, k, k, implementation="fast"), ("'fast'", "chunked")),
    ]:
        with pytest.raises(UserError) as error:
            call()
        assert "\n" not in str(error.value) and all(part in str(error.value) for part in parts), error.value


def test_padded_length_is_what_the_layouts_need():
    assert [layouts.padded_length(layout, 53, 4) for layout in LAYOUTS] == [56, 56, 64, 56]
