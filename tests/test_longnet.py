"""Dilated attention against an oracle of boolean masks, on one device and over meshes, with gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcx.mesh import make_mesh
from lcx.ops.attention import attention
from lcx.ops.types import Mask
from lcx.parallel.dilated import dilated_attention
from lcx.planning.hlo import operations
from lcx.registry import UserError
from tests.tolerance import GRADIENTS, assert_close, rms_ratio


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: B S H G K, branches, documents (lengths in each row, the rest padding)."""

    sizes: tuple[int, ...] = (2, 64, 4, 2, 8)
    segments: tuple[int, ...] = (8, 16, 64)
    dilations: tuple[int, ...] = (1, 2, 4)
    causal: bool = True
    documents: tuple[tuple[int, ...], ...] | None = None
    softcap: float | None = None
    mixing_gradient: bool = True

    def arrays(self) -> dict[str, np.ndarray]:
        B, S, H, G, K = self.sizes
        random = np.random.default_rng(0)
        shapes = dict(q=(B, S, H, K), k=(B, S, G, K), v=(B, S, G, K), do=(B, S, H, K))
        arrays = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        arrays["segments"] = np.ones((B, S), np.int32)
        for row, lengths in enumerate(self.documents or ()):
            ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)
            arrays["segments"][row] = np.pad(ids, (0, S - len(ids)))
        return arrays


def kept_bHSS(case: Case) -> np.ndarray:
    """Whether head h's query i sees key j in branch b, documents left aside."""
    _, S, H, G, _ = case.sizes
    order, masks = np.arange(S), []
    for w, r in zip(case.segments, case.dilations, strict=True):
        same = order[:, None] // w == order[None] // w
        if case.causal:
            same &= order[:, None] >= order[None]
        keeps = (order[None] % w) % r == (np.arange(H)[:, None] // (H // G)) % r
        masks.append(same[None] & keeps[:, :, None] & keeps[:, None, :])
    return np.stack(masks)


def oracle(case: Case, q, k, v, segments):
    """Each branch densely, under its mask; then the mixture by the softmax of logsumexp."""
    repeat = case.sizes[2] // case.sizes[3]
    scores = jnp.einsum("bshk,bthk->bhst", q, jnp.repeat(k, repeat, 2)) * q.shape[-1] ** -0.5
    if case.softcap:
        scores = case.softcap * jnp.tanh(scores / case.softcap)
    documents = (segments[:, :, None] == segments[:, None, :]) & (segments[:, :, None] > 0)
    outputs, lses = [], []
    for mask in kept_bHSS(case):
        seen = jnp.asarray(mask)[None] & documents[:, None]
        empty = ~seen.any(-1)
        lse = jnp.where(empty, -jnp.inf, jax.nn.logsumexp(jnp.where(seen | empty[..., None], scores, -jnp.inf), axis=-1))
        p = jnp.where(seen, jnp.exp(scores - jnp.where(empty, 0.0, lse)[..., None]), 0.0)
        outputs.append(jnp.einsum("bhst,bthk->bshk", p, jnp.repeat(v, repeat, 2)))
        lses.append(lse)
    lse = jnp.stack(lses)
    top = jnp.max(lse, 0, keepdims=True)
    weights = jnp.where(lse == -jnp.inf, 0.0, jnp.exp(lse - jnp.where(top == -jnp.inf, 0.0, top)))
    total = weights.sum(0, keepdims=True)
    weights = weights / jnp.where(total == 0, 1.0, total)
    if not case.mixing_gradient:
        weights = jax.lax.stop_gradient(weights)
    return jnp.einsum("nbhs,nbshk->bshk", weights, jnp.stack(outputs))


def outputs_of(attend, arrays):
    """o, dq, dk, dv of `attend(q, k, v, segments)`."""

    @jax.jit
    def run(q, k, v, do, segments):
        o, pull = jax.vjp(lambda q, k, v: attend(q, k, v, segments), q, k, v)
        return dict(zip(("o", "dq", "dk", "dv"), (o, *pull(do)), strict=True))

    return run(*(jnp.asarray(arrays[name]) for name in ("q", "k", "v", "do", "segments")))


@functools.cache
def expected_of(case: Case):
    return outputs_of(functools.partial(oracle, case), case.arrays())


def actual_of(case: Case, mesh, arrays=None, **options):
    def attend(q, k, v, segments):
        return dilated_attention(
            q,
            k,
            v,
            mesh=mesh,
            segments=case.segments,
            dilations=case.dilations,
            causal=case.causal,
            segments_BS=segments if case.documents else None,
            softcap=case.softcap,
            mixing_gradient=case.mixing_gradient,
            **options,
        )

    with jax.set_mesh(mesh):
        return outputs_of(attend, arrays or case.arrays())


def compare(actual, expected):
    for name, x in expected.items():
        assert_close(actual[name], x, name=name, gradient=name != "o")


DOCUMENTS = ((19, 23, 15), (40, 9))
CASES = {
    "causal": Case(),
    "bidirectional": Case(causal=False),
    "packed": Case(documents=DOCUMENTS),
    "bidirectional_packed": Case(causal=False, documents=DOCUMENTS),
    "paper_mixing": Case(mixing_gradient=False),
    "softcap": Case(softcap=2.0),
    "mqa": Case(sizes=(1, 64, 4, 1, 8)),
    "more_offsets_than_heads": Case(segments=(8, 64), dilations=(1, 8)),
    "heads_no_multiple_of_offsets": Case(sizes=(1, 64, 5, 5, 8), segments=(16, 64), dilations=(1, 3)),
    "odd_length": Case(sizes=(2, 53, 4, 4, 8), segments=(8, 16, 64)),
    "odd_length_bidirectional": Case(sizes=(2, 53, 4, 4, 8), segments=(8, 16, 64), causal=False),
    "segment_longer_than_the_row": Case(segments=(16, 1000), dilations=(1, 2)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_equals_the_oracle(mesh_of, case):
    compare(actual_of(case, mesh_of()), expected_of(case))


MESHES = {
    "segments inside, equal to and across shards": (Case(documents=DOCUMENTS), dict(seq=4)),
    "groups of shards": (Case(segments=(8, 16, 32), dilations=(1, 1, 4)), dict(seq=8)),
    "every segment across shards": (Case(segments=(16, 64), dilations=(2, 1), causal=False), dict(seq=8)),
    "batch and heads spread, offsets by global head": (
        Case(sizes=(2, 64, 8, 4, 8), segments=(8, 32), dilations=(1, 4), documents=DOCUMENTS),
        dict(data=2, seq=2, tensor=2),
    ),
    "paper mixing": (Case(mixing_gradient=False), dict(seq=4)),
}


@pytest.mark.parametrize("case,sizes", MESHES.values(), ids=list(MESHES))
def test_every_mesh_equals_the_oracle(mesh_of, case, sizes):
    compare(actual_of(case, mesh_of(**sizes)), expected_of(case))


def test_a_changed_shard_is_noticed(mesh_of):
    """The twin: keys of one shard scaled by a hundredth."""
    case, mesh = MESHES["groups of shards"][0], mesh_of(seq=8)
    arrays = case.arrays()
    arrays["k"][:, 8:16] *= 1.01
    actual, expected = actual_of(case, mesh, arrays), expected_of(case)
    assert max(rms_ratio(actual[name], expected[name]) for name in ("dq", "dk", "dv")) > 100 * GRADIENTS["float32"]


def test_mixing_weights_as_constants_are_another_gradient():
    one, other = expected_of(Case()), expected_of(Case(mixing_gradient=False))
    assert rms_ratio(one["dq"], other["dq"]) > 1e-3
    assert_close(one["o"], other["o"])


def test_one_branch_over_the_whole_row_is_full_attention(mesh_of):
    case = Case(segments=(64,), dilations=(1,))
    full = outputs_of(lambda q, k, v, segments: attention(q, k, v, mask=Mask(), implementation="reference"), case.arrays())
    compare(actual_of(case, mesh_of(seq=4)), full)


@settings(max_examples=6, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_shape(data):
    length = data.draw(st.integers(1, 70))
    heads = data.draw(st.sampled_from([(1, 1), (4, 2), (6, 3), (5, 5)]))
    more = data.draw(st.lists(st.tuples(st.integers(1, 80), st.integers(1, 9)), max_size=2))
    segments, dilations = zip((data.draw(st.integers(1, 40)), 1), *more, strict=True)
    case = Case((1, length, *heads, 4), segments, dilations, causal=data.draw(st.booleans()))
    compare(actual_of(case, make_mesh()), expected_of(case))


@pytest.mark.parametrize(
    "segments,dilations,text",
    [
        ((8, 16), (1,), "must be as many"),
        ((8,), (2,), "must hold a 1"),
        ((8, 0), (1, 1), "at least 1"),
        ((6,), (1,), "segment 6 must divide the 16 tokens of a shard"),
        ((48,), (1,), "segment 48 spans 3 shards"),
        ((16, 64), (1, 3), "dilation 3 of segment 64 must divide the 16 tokens"),
    ],
)
def test_branches_that_do_not_fit_are_one_line(mesh_of, segments, dilations, text):
    with pytest.raises(UserError, match=text) as error:
        actual_of(Case(segments=segments, dilations=dilations), mesh_of(seq=4))
    assert "\n" not in str(error.value)


def compiled(length: int, shards: int, segments, dilations, heads: int = 2):
    """Forward and backward of one row."""
    mesh, shape = make_mesh(seq=shards), jax.ShapeDtypeStruct((1, length, heads, 8), jnp.float32)

    def loss(q, k, v):
        return jnp.sum(dilated_attention(q, k, v, mesh=mesh, segments=segments, dilations=dilations))

    with jax.set_mesh(mesh):
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(shape, shape, shape).compile()


def moved_bytes(program) -> dict[str, int]:
    """Bytes of the results of collectives on one device, by kind."""
    kinds, moved = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute"), {}
    for op in operations(program.as_text()):
        if (kind := op.kind.removesuffix("-start")) in kinds:
            moved[kind] = moved.get(kind, 0) + op.bytes * op.times
    return moved


def test_bytes_on_the_wire_do_not_depend_on_the_length():
    """A million tokens over 8 devices and a billion over 32: the longest branch keeps 2,048 keys of its segment in both."""
    few = moved_bytes(compiled(2**20, 8, (256, 2**20), (1, 2**9)))
    many = moved_bytes(compiled(2**30, 32, (256, 2**30), (1, 2**19)))
    assert few.keys() == many.keys() == {"all-gather", "reduce-scatter"}
    assert few["all-gather"] == many["all-gather"] and few["reduce-scatter"] == 4 * many["reduce-scatter"], "1/P of the gathered"
    assert moved_bytes(compiled(2**30, 32, (256, 2**30), (1, 2**17)))["all-gather"] == 4 * few["all-gather"], "the twin"
