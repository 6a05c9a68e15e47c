"""Attention over a mesh: every strategy and layout against the reference on whole arrays, values and gradients by name."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from lcx.ops.attention import attention
from lcx.ops.types import Mask
from lcx.parallel import STRATEGIES, cyclic, layouts, passes, ring, route
from lcx.parallel import attention as attention_over_mesh
from lcx.parallel.attention import context_attention
from lcx.parallel.layouts import LAYOUTS, sequence_permutation
from lcx.registry import UserError
from lcx.sharding import activation_spec
from pallas_kernels import attention_tpu, interpret
from tests.tolerance import GRADIENTS, assert_close, rms_ratio

DIMS = dict(
    q="BSHK",
    k="BTGK",
    v="BTGK",
    sink="H",
    segments="BS",
    do="BSHK",
    dlse="BHS",
    dq="BSHK",
    dk="BTGK",
    dv="BTGK",
    o="BSHK",
    lse="BHS",
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention call on S = 64 tokens or so. `breaks` names the input whose change must turn the comparison red."""

    mask: Mask = Mask()
    length: int = 64
    heads: tuple[int, int] = (4, 4)
    packed: bool = False
    sink_logits: bool = False
    softcap: float | None = None
    alibi: bool = False
    return_lse: bool = False
    rows: int = 2
    breaks: str = "k"

    @property
    def slopes_H(self):
        return jnp.linspace(0.5, 0.1, self.heads[0]) if self.alibi else None

    def arrays(self) -> dict[str, np.ndarray]:
        """Inputs and cotangents by name, tokens in order."""
        draw = functools.partial(np.random.default_rng(0).normal, size=None)
        (H, G), B, S, K = self.heads, self.rows, self.length, 8
        shapes = dict(q=(B, S, H, K), k=(B, S, G, K), v=(B, S, G, K), do=(B, S, H, K))
        arrays = {name: draw(size=shape).astype(np.float32) for name, shape in shapes.items()}
        if self.sink_logits:
            arrays["sink"] = np.linspace(-1, 1, H, dtype=np.float32)
        if self.return_lse:
            arrays["dlse"] = draw(size=(B, H, S)).astype(np.float32)
        if self.packed:  # the last quarter of the first row and all of the last are padding
            arrays["segments"] = np.zeros((B, S), np.int32)
            for row in range(B - 1):
                cuts = np.array([0.3 + 0.1 * row, 0.34, 0.72]) * S
                arrays["segments"][row] = np.searchsorted(cuts, np.arange(S), side="right") + 1
                arrays["segments"][row][int(0.72 * S) :] = 0
        return arrays

    def run(self, attend, inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Outputs and gradients by name; `attend(q, k, v, segments, **options)`."""
        options = dict(mask=self.mask, softcap=self.softcap, alibi_slopes_H=self.slopes_H, return_lse=self.return_lse)
        names = [name for name in ("q", "k", "v", "sink") if name in inputs]

        def call(*differentiated):
            given = dict(zip(names, differentiated, strict=True))
            segments = inputs["segments"] if self.packed else None
            sink_H = given["sink"] if self.sink_logits else None
            out = attend(given["q"], given["k"], given["v"], segments, sink_logits_H=sink_H, **options)
            return dict(o=out[0], lse=out[1]) if self.return_lse else dict(o=out)

        out, pull = jax.vjp(call, *(inputs[name] for name in names))
        cotangents = dict(o=inputs["do"], lse=inputs["dlse"]) if self.return_lse else dict(o=inputs["do"])
        return out | {f"d{name}": grad for name, grad in zip(names, pull(cotangents), strict=True)}


CASES = {
    "causal": Case(),
    "full": Case(Mask(causal=False), breaks="v"),
    "packed_padded": Case(packed=True, rows=3, breaks="segments"),
    "window": Case(Mask(window=(9, 0))),
    "two_sided_window": Case(Mask(causal=False, window=(5, 9))),
    "sink_tokens": Case(Mask(window=(9, 0), sink_tokens=3), breaks="v"),
    "sink_tokens_packed": Case(Mask(window=(5, 0), sink_tokens=10), packed=True, breaks="segments"),
    "sink_logits_gqa": Case(sink_logits=True, heads=(8, 4), return_lse=True, breaks="sink"),
    "mqa_lse": Case(heads=(4, 1), return_lse=True, breaks="dlse"),
    "odd_length": Case(length=53, heads=(4, 2)),
    "softcap_alibi": Case(softcap=1.5, alibi=True, breaks="q"),
    "everything": Case(
        Mask(window=(9, 0), sink_tokens=2),
        length=61,
        heads=(4, 2),
        packed=True,
        sink_logits=True,
        softcap=2.0,
        alibi=True,
        return_lse=True,
        breaks="segments",
    ),
}


def _place(name: str, x: np.ndarray, mesh, index) -> jax.Array:
    """An array in layout order, spread over the mesh where its sizes allow."""
    dims = DIMS[name]
    token_dim = next((i for i, d in enumerate(dims) if d in "ST"), None)
    x = x if token_dim is None else np.take(x, index, axis=token_dim)
    if token_dim is not None and x.shape[token_dim] % mesh.shape["seq"]:
        return jnp.asarray(x)
    return jax.device_put(x, NamedSharding(mesh, activation_spec(dims)))


@functools.cache
def _expected(case: Case) -> dict[str, np.ndarray]:
    def attend(q, k, v, segments, **options):
        return attention(q, k, v, segments_q_BS=segments, segments_k_BT=segments, implementation="reference", **options)

    inputs = {name: jnp.asarray(x) for name, x in case.arrays().items()}
    run = jax.jit(functools.partial(case.run, attend))
    return {name: np.asarray(x) for name, x in run(inputs).items()}


class Sharded:
    """One compiled call; `__call__` takes and gives arrays with tokens in order."""

    def __init__(self, case: Case, mesh, strategy: str, layout: str, **options):
        self.case, self.mesh = case, mesh
        self.index = sequence_permutation(layout, case.length, mesh.shape["seq"])

        def attend(q, k, v, segments, **others):
            return context_attention(
                q, k, v, mesh=mesh, strategy=strategy, layout=layout, segments_BS=segments, **others, **options
            )

        self.run = jax.jit(functools.partial(case.run, attend))

    def _placed(self, arrays):
        return {name: _place(name, x, self.mesh, self.index) for name, x in arrays.items()}

    def __call__(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs, order = {}, np.argsort(self.index)
        for name, x in self.run(self._placed(arrays)).items():
            dims = DIMS[name] if name in DIMS else DIMS[name[1:]]
            token_dim = next((i for i, d in enumerate(dims) if d in "ST"), None)
            outputs[name] = np.asarray(x) if token_dim is None else np.take(np.asarray(x), order, axis=token_dim)
        return outputs


def _broken(case: Case, shards: int) -> dict[str, np.ndarray]:
    """The inputs with one change: the tokens of one shard doubled, or one document leaking into the next."""
    arrays = case.arrays()
    x = arrays[case.breaks].copy()
    if case.breaks == "segments":
        x[0][x[0] == 2] = 1
    elif case.breaks == "sink":
        x[0] += 0.1
    else:
        token_dim = DIMS[case.breaks].index("T" if case.breaks in "kv" else "S")
        one_shard = [slice(None)] * x.ndim
        one_shard[token_dim] = slice(0, case.length // shards)
        x[tuple(one_shard)] *= 1.1
    return arrays | {case.breaks: x}


def _assert_equal_to_whole(case: Case, sharded: Sharded) -> None:
    """Every value and gradient equal; and not, with one input changed."""
    expected, actual = _expected(case), sharded(case.arrays())
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        if name == "lse":  # a row without keys has -inf on both sides
            assert (np.isneginf(actual[name]) == np.isneginf(x)).all()
            actual[name], x = (np.where(np.isneginf(a), 0, a) for a in (actual[name], x))
        assert_close(actual[name], x, name=name, gradient=name.startswith("d"))
    if case.packed:
        empty = case.arrays()["segments"] == 0
        assert empty.any()
        for name in ("o", "dq", "dk", "dv"):
            assert (actual[name][empty] == 0).all(), f"{name} of padding"
    broken = sharded(_broken(case, sharded.mesh.shape["seq"]))
    worst = max(rms_ratio(broken[name], expected[name]) for name in ("dq", "dk", "dv"))
    assert worst > 100 * GRADIENTS["float32"], f"a change of {case.breaks} goes unnoticed"


def _options(strategy: str) -> dict:
    """Groups of two where a strategy has groups, so that there is a ring between them."""
    return dict(ulysses_degree=2) if strategy == "ulysses_ring" else {}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_equal_to_whole(mesh_of, case, strategy):
    """In zigzag order on four devices."""
    _assert_equal_to_whole(case, Sharded(case, mesh_of(seq=4), strategy, "zigzag", **_options(strategy)))


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
    options = {} if layout == "striped" else _options(strategy)
    _assert_equal_to_whole(CASES[name], Sharded(CASES[name], mesh_of(seq=4), strategy, layout, **options))


@pytest.mark.parametrize(("strategy", "name"), [("ring", "causal"), ("ring", "everything"), ("ulysses", "window")])
def test_equal_to_whole_in_cyclic_order(mesh_of, monkeypatch, strategy, name):
    """In blocks of four tokens, four to a device."""
    monkeypatch.setattr(cyclic, "BLOCK", 4)
    case = dataclasses.replace(CASES[name], length=64)
    _assert_equal_to_whole(case, Sharded(case, mesh_of(seq=4), strategy, "cyclic"))


@pytest.mark.parametrize(("strategy", "layout"), [("ring", "cyclic"), ("ulysses_ring", "contiguous")])
def test_equal_to_whole_with_sinks_that_are_fetched_apart(mesh_of, monkeypatch, strategy, layout):
    """In cyclic order, and by groups of two devices of which every second holds the same part of the heads."""
    monkeypatch.setattr(cyclic, "BLOCK", 4)
    case = CASES["sink_tokens"]
    _assert_equal_to_whole(case, Sharded(case, mesh_of(seq=8), strategy, layout, **_options(strategy)))


@pytest.mark.parametrize(("strategy", "kv_heads"), [("ring", 4), ("ulysses", 8), ("allgather", 2)])
def test_equal_to_whole_a_few_heads_at_a_time(mesh_of, monkeypatch, strategy, kv_heads):
    """As many passes as the key/value heads and the strategy allow."""
    monkeypatch.setattr(passes, "PAIRS", 1)
    case = dataclasses.replace(CASES["everything"], heads=(8, kv_heads))
    made, real = [], passes.in_passes
    monkeypatch.setattr(attention_over_mesh, "in_passes", lambda fn, n, *rest: made.append(n) or real(fn, n, *rest))
    _assert_equal_to_whole(case, Sharded(case, mesh_of(seq=4), strategy, "zigzag"))
    assert set(made) == {2 if strategy == "ulysses" else kv_heads}


@pytest.mark.parametrize(("name", "devices"), [("everything", 4), ("full", 5), ("odd_length", 3)])
def test_equal_to_whole_with_half_of_the_heads_each_way(mesh_of, monkeypatch, name, devices):
    monkeypatch.setattr(route, "both_ways", lambda tokens: True)
    _assert_equal_to_whole(CASES[name], Sharded(CASES[name], mesh_of(seq=devices), "ring", "zigzag"))


@pytest.mark.parametrize("tokens", [1, 3])
def test_equal_to_whole_with_few_tokens_a_device(mesh_of, tokens):
    """One token cannot be divided into the halves that hide the backward ring's first and last transfer."""
    case = Case(length=4 * tokens, heads=(2, 1))
    _assert_equal_to_whole(case, Sharded(case, mesh_of(seq=4), "ring", "contiguous"))


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
        sharded = Sharded(case, mesh_of(seq=devices), strategy, "zigzag", implementation="mosaic_tpu", **_options(strategy))
        _assert_equal_to_whole(case, sharded)


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
    _assert_equal_to_whole(case, Sharded(case, mesh_of(**sizes), strategy, layout))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_forward_alone_gives_the_same_values(mesh_of, strategy):
    """Differentiating must not choose another computation."""
    case, mesh = CASES["sink_logits_gqa"], mesh_of(seq=4)
    index = sequence_permutation("zigzag", case.length, 4)
    q, k, v = (_place(name, case.arrays()[name], mesh, index) for name in "qkv")
    attend = functools.partial(context_attention, mesh=mesh, strategy=strategy, mask=case.mask, **_options(strategy))
    alone = jax.jit(attend)(q, k, v)
    primal = jax.jit(lambda *x: jax.vjp(attend, *x)[0])(q, k, v)
    assert (np.asarray(alone) == np.asarray(primal)).all()


ACCURACY = Case(length=128, heads=(2, 1), rows=1, return_lse=True)


@functools.cache
def _accuracy_case(dtype: str):
    """Inputs that `dtype` represents exactly, and what the reference makes of them in fp32."""
    arrays = ACCURACY.arrays()
    for name in "qkv":
        arrays[name] = np.asarray(jnp.asarray(arrays[name], dtype), np.float32)

    def dense(q, k, v, segments, **options):
        return attention(q, k, v, implementation="reference", **options)

    inputs = {name: jnp.asarray(x) for name, x in arrays.items()}
    return arrays, jax.jit(functools.partial(ACCURACY.run, dense))(inputs)


def _errors(mesh, dtype: str) -> dict[str, float]:
    """RMS ratio of o, dq, dk and dv to the reference on the same inputs; ring, zigzag."""
    arrays, expected = _accuracy_case(dtype)
    index = sequence_permutation("zigzag", ACCURACY.length, mesh.shape["seq"])
    placed = {name: _place(name, x.astype(dtype) if name in "qkv" else x, mesh, index) for name, x in arrays.items()}

    def attend(q, k, v, segments, **options):
        return context_attention(q, k, v, mesh=mesh, **options)

    actual = jax.jit(functools.partial(ACCURACY.run, attend))(placed)
    return {name: rms_ratio(np.asarray(actual[name])[:, np.argsort(index)], expected[name]) for name in ("o", "dq", "dk", "dv")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_error_does_not_grow_with_devices(mesh_of, dtype):
    """Partial results and travelling gradients are fp32, so that 32 hops cost no more accuracy than 2."""
    devices = (2, 4, 8, 16, 32) if dtype == "float32" else (2, 32)
    errors = {P: _errors(mesh_of(seq=P), dtype) for P in devices}
    for name, at_two in errors[2].items():
        for P, at in errors.items():
            assert at[name] <= 2 * at_two, (name, P, errors)


def test_error_would_grow_with_rounded_partials(mesh_of, monkeypatch):
    """The twin of the test above."""
    limit = 2 * _errors(mesh_of(seq=2), "bfloat16")["o"]
    exact = ring.block_forward

    def rounded(plan, queries, keys, order_k, carry=None):
        o, lse = exact(plan, queries, keys, order_k, carry)
        return o.astype(jnp.bfloat16).astype(jnp.float32), lse

    monkeypatch.setattr(ring, "block_forward", rounded)
    assert _errors(mesh_of(seq=32), "bfloat16")["o"] > limit


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
