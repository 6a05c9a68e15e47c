"""What attention over a mesh sends: which collectives, how often, of which type and size. Equal values do not show that.

Counted in the traced program, which has the types that are sent (XLA turns bf16 into fp32 on CPU); one test compares it with
what XLA compiles.
"""

import collections
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import NamedSharding

from lcx.ops.types import Mask
from lcx.parallel import hops, route
from lcx.parallel.attention import context_attention
from lcx.parallel.layouts import LAYOUTS, sequence_permutation
from lcx.sharding import activation_spec

SENDS = ("ppermute", "all_to_all", "all_gather", "psum", "reduce_scatter")
Sent = collections.Counter  # (collective, "dtype[sizes]" of one device's operand) -> times executed


def _executed(jaxpr, times: int = 1) -> Sent:
    """Collectives that one device executes, loops counted as often as they run."""
    counts = Sent()
    for equation in jaxpr.eqns:
        name = equation.primitive.name.removesuffix("_invariant")
        if name in SENDS:
            for operand in equation.invars:
                counts[name, operand.aval.str_short(short_dtypes=True).partition("{")[0]] += times
        inner = sum((_executed(x, times * equation.params.get("length", 1)) for x in jaxprs_in_params(equation.params)), Sent())
        assert not (inner and name == "while"), "a collective in a loop of unknown length"
        counts += inner
    return counts


def _executed_hlo(text: str) -> Sent:
    """As `_executed`, from compiled HLO."""
    bodies, name = {}, None
    for line in text.splitlines():
        header = re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if header:
            name = "ENTRY" if header.group(1) else header.group(2)
            bodies[name] = []
        elif name:
            bodies[name].append(line)

    def walk(name, times):
        counts = Sent()
        for line in bodies[name]:
            if op := re.search(r"= f32\[([\d,]*)\]\S* collective-permute\(", line):
                counts["ppermute", f"f32[{op.group(1)}]"] += times
            trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            for callee in re.findall(r"(?:body|calls|to_apply)=%?([\w.\-]+)", line):
                counts += walk(callee, times * (int(trips.group(1)) if trips else 1))
        return counts

    return walk("ENTRY", 1)


class Program:
    """`context_attention` of shapes on a mesh, forward, and forward with backward."""

    def __init__(self, mesh, mask, *, heads=(4, 2), length=256, dtype="bfloat16", packed=False, **options):
        def shape(dims, dtype, *sizes):
            return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, activation_spec(dims)))

        q = shape("BSHK", dtype, 1, length, heads[0], 8)
        k = shape("BTGK", dtype, 1, length, heads[1], 8)
        self.shapes = (q, k, k, shape("BS", "int32", 1, length) if packed else None)

        def attend(q, k, v, segments):
            return context_attention(q, k, v, mesh=mesh, mask=mask, segments_BS=segments, **options)

        def both(q, k, v, segments):
            o, pull = jax.vjp(lambda *x: attend(*x, segments), q, k, v)
            return pull(o)

        self.attend, self.both = jax.jit(attend), jax.jit(both)

    def sent(self) -> Sent:
        """Of the forward pass."""
        return _executed(self.attend.trace(*self.shapes).jaxpr.jaxpr)

    def sent_back(self) -> Sent:
        """Of the backward pass alone."""
        return _executed(self.both.trace(*self.shapes).jaxpr.jaxpr) - self.sent()


@pytest.mark.parametrize("P", [1, 2, 4, 8, 32])
def test_ring_makes_one_hop_less_than_there_are_devices(mesh_of, P):
    """Keys and values in their own dtype and number, document ids as one array, gradients in fp32."""
    s, hops_made = 256 // P, P - 1
    keys, ids, grads = ("ppermute", f"bf16[1,{s},2,8]"), ("ppermute", f"i32[1,{s}]"), ("ppermute", f"f32[1,{s},2,8]")
    plain, packed = Program(mesh_of(seq=P), Mask()), Program(mesh_of(seq=P), Mask(), packed=True)
    assert plain.sent() == +Sent({keys: 2 * hops_made})
    assert plain.sent_back() == +Sent({keys: 2 * hops_made, grads: 2 * hops_made})
    assert packed.sent() == +Sent({keys: 2 * hops_made, ids: hops_made})
    assert packed.sent_back() == +Sent({keys: 2 * hops_made, ids: hops_made, grads: 2 * hops_made})


def test_queries_travel_back_where_they_are_fewer_bytes(mesh_of):
    """With as many key/value heads as query heads: q, do, lse, delta and the fp32 dq are less than k, v and the fp32 dk, dv."""
    wide = dict(heads=(4, 4), packed=True)
    queries, ids = ("ppermute", "bf16[1,64,4,8]"), ("ppermute", "i32[1,64]")
    rows, grad = ("ppermute", "i32[1,9,64]"), ("ppermute", "f32[1,64,4,8]")
    program = Program(mesh_of(seq=4), Mask(), **wide)
    assert program.sent() == {queries: 2 * 3, ids: 3}
    assert program.sent_back() == {queries: 2 * 3, rows: 3, grad: 3}
    # A window's blocks come from the one side, and the queries that need a block stand on the other.
    window = Program(mesh_of(seq=8), Mask(window=(31, 0)), heads=(4, 4), layout="contiguous")
    assert window.sent_back()["ppermute", "bf16[1,32,4,8]"] == 2


def test_half_of_the_heads_each_way_is_as_much_in_messages_of_half_the_size(mesh_of, monkeypatch):
    mesh, size = (
        mesh_of(seq=8),
        lambda sent: sum(n * math.prod(map(int, re.findall(r"\d+", x)[1:])) for (_, x), n in sent.items()),
    )
    one_way = Program(mesh, Mask(), heads=(4, 2))
    monkeypatch.setattr(route, "both_ways", lambda tokens: True)
    both = Program(mesh, Mask(), heads=(4, 2))
    assert both.sent() == {("ppermute", "bf16[1,32,1,8]"): 2 * 2 * 7}
    assert (size(both.sent()), size(both.sent_back())) == (size(one_way.sent()), size(one_way.sent_back()))
    ways = re.findall(r"source_target_pairs = dense<\[\[0, (\d)\]", both.attend.lower(*both.shapes).as_text())
    assert set(ways) == {"1", "7"}


@pytest.mark.parametrize(
    ("platform", "tokens", "expected"), [("tpu", 2**14, True), ("tpu", 2**14 + 1, False), ("cuda", 1, False), ("cpu", 1, False)]
)
def test_links_of_a_gpu_and_long_blocks_need_one_way(monkeypatch, platform, tokens, expected):
    device = types.SimpleNamespace(device_kind="any", platform=platform)
    monkeypatch.setattr(jax.sharding, "get_abstract_mesh", lambda: types.SimpleNamespace(abstract_device=device))
    assert route.both_ways(tokens) == expected


def test_xla_sends_what_was_traced(mesh_of):
    """In fp32, on eight devices: loops there and back, and the two legs of a window."""
    compiled = lambda run, program: run.lower(*program.shapes).compile().as_text()
    whole = Program(mesh_of(seq=8), Mask(), dtype="float32")
    assert _executed_hlo(compiled(whole.both, whole)) == whole.sent() + whole.sent_back()
    window = Program(mesh_of(seq=8), Mask(causal=False, window=(40, 70)), dtype="float32", layout="contiguous")
    assert _executed_hlo(compiled(window.attend, window)) == window.sent() == {("ppermute", "f32[1,32,2,8]"): 2 * (2 + 3)}


@pytest.mark.parametrize(
    "layout,mask,forward,backward",
    [
        ("contiguous", Mask(window=(31, 0)), 1, 0),
        ("contiguous", Mask(window=(33, 0)), 2, 0),
        ("contiguous", Mask(causal=False, window=(31, 40)), 1, 2),
        ("zigzag", Mask(window=(15, 0)), 1, 1),
        ("zigzag", Mask(causal=False, window=(20, 20)), 2, 2),
        ("contiguous", Mask(window=(31, 0), sink_tokens=4), 1, 0),
        ("zigzag", Mask(window=(15, 0), sink_tokens=4), 1, 1),
        ("zigzag", Mask(window=(15, 0), sink_tokens=17), 7, 0),
        ("striped", Mask(window=(31, 0)), 7, 0),
    ],
    ids=str,
)
def test_a_window_takes_only_the_hops_it_needs(mesh_of, layout, mask, forward, backward):
    """Eight devices of 32 tokens. Gradients make one hop less on each leg and go home in one; four sink tokens travel apart."""
    program, made = Program(mesh_of(seq=8), mask, layout=layout), 2 * (forward + backward)
    keys, grads = ("ppermute", "bf16[1,32,2,8]"), ("ppermute", "f32[1,32,2,8]")
    apart = mask.sink_tokens == 4
    sinks, sink_grads = {("psum", "bf16[1,4,2,8]"): 2 * apart}, {("psum", "f32[1,4,2,8]"): 2 * apart}
    assert program.sent() == Sent({keys: made} | sinks)
    assert program.sent_back() == Sent({keys: made, grads: made} | sinks | sink_grads)


def test_legs_bring_every_needed_block_past_and_are_shortest():
    for size in (1, 2, 5, 8):
        for chosen in range(1 << (size - 1)):
            distances = [d for d in range(1, size) if chosen >> (d - 1) & 1]
            legs = hops.shortest_legs(distances, size)
            passed = {sign * step % size for sign, count in legs for step in range(1, count + 1)}
            assert set(distances) <= passed
            best = min(
                a + b for a in range(size) for b in range(size) if set(distances) <= {*range(1, a + 1), *range(size - b, size)}
            )
            assert sum(count for _, count in legs) == best


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", [Mask(), Mask(window=(7, 0)), Mask(causal=False, window=(3, 12)), Mask(causal=False)], ids=str)
def test_needed_distances_by_every_pair(layout, mask):
    """No needed block is left out; in layouts of neighbouring tokens none is visited in vain."""
    length, size = 64, 4
    order = sequence_permutation(layout, length, size).reshape(size, -1)
    between = order[:, None, :, None] - order[None, :, None, :]
    seen = np.ones_like(between, bool)
    if mask.left is not None:
        seen &= between <= mask.left
    if mask.right is not None:
        seen &= between >= -mask.right
    by_pair = seen.any((2, 3))
    needed = [d for d in range(1, size) if any(by_pair[r, (r - d) % size] for r in range(size))]
    found = hops.needed_distances(mask, layout, length, size)
    assert found == needed if layout != "striped" else set(needed) <= set(found)


def test_program_does_not_grow_with_devices(mesh_of):
    def instructions(P):
        q = jax.ShapeDtypeStruct((1, 256, 2, 8), "float32")
        attend = lambda q, k, v: context_attention(q, k, v, mesh=mesh_of(seq=P), mask=Mask())
        return jax.jit(jax.grad(lambda *x: attend(*x).sum(), argnums=(0, 1, 2))).lower(q, q, q).as_text().count("\n")

    assert instructions(32) == instructions(8)


def test_ulysses_sends_each_token_once(mesh_of):
    """Four devices of 64 tokens. Two key/value heads: traded between two devices, then gathered by the two that share one."""
    mesh = mesh_of(seq=4)
    back = {("all_to_all", "bf16[1,256,2,8]"): 1, ("all_to_all", "f32[1,2,256]"): 1}
    enough = Program(mesh, Mask(), strategy="ulysses", heads=(8, 4), layout="contiguous")
    assert enough.sent() == {("all_to_all", "bf16[1,64,8,8]"): 1, ("all_to_all", "bf16[1,64,4,8]"): 2, **back}
    fewer = Program(mesh, Mask(), strategy="ulysses", heads=(8, 2), layout="contiguous")
    shared = {("all_to_all", "bf16[1,64,2,8]"): 2, ("all_gather", "bf16[1,2,64,1,8]"): 2}
    assert fewer.sent() == {("all_to_all", "bf16[1,64,8,8]"): 1, **shared, **back}
    sums = {("reduce_scatter", "f32[1,2,2,64,1,8]"): 2, ("all_to_all", "bf16[1,128,1,8]"): 2}
    traded = {("all_to_all", "bf16[1,64,8,8]"): 2, ("all_to_all", "f32[1,2,8,64]"): 1, ("all_to_all", "bf16[1,256,2,8]"): 1}
    assert fewer.sent_back() == {**traded, **shared, **sums}


def test_allgather_sums_in_fp32(mesh_of):
    program = Program(mesh_of(seq=4), Mask(), strategy="allgather")
    gathered = {("all_gather", "bf16[1,64,2,8]"): 2}
    assert program.sent() == gathered
    assert program.sent_back() == gathered | {("reduce_scatter", "f32[1,256,2,8]"): 2}


def test_groups_make_the_ring_shorter(mesh_of):
    """Eight devices in groups of four: one hop of four times the tokens of a quarter of the heads."""
    program = Program(mesh_of(seq=8), Mask(), strategy="ulysses_ring", ulysses_degree=4, heads=(8, 4))
    hops_made = {operand: n for (name, operand), n in program.sent().items() if name == "ppermute"}
    assert hops_made == {"bf16[1,128,1,8]": 2}


def test_a_remat_policy_saves_the_forward_ring(mesh_of):
    """Output and logsumexp are named, so that rematerialisation does not send the keys round again."""
    mesh = mesh_of(seq=4)
    x = jax.ShapeDtypeStruct((1, 64, 2, 8), "float32")

    def permutes(policy):
        layer = jax.checkpoint(lambda x: jnp.tanh(context_attention(x, 2 * x, 3 * x, mesh=mesh, mask=Mask())), policy=policy)
        step = jax.jit(jax.value_and_grad(lambda x: layer(layer(x)).sum()))
        return sum(_executed(step.trace(x).jaxpr.jaxpr).values())

    # Two layers of three hops: k and v forward; q, do, dq and what is known of each query backward; k and v again if replayed.
    assert permutes(jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")) == 2 * 3 * 6
    assert permutes(jax.checkpoint_policies.nothing_saveable) == 2 * 3 * 8
