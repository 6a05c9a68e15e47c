"""Attention on one device: every implementation against an oracle that shares no code with it."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcx.ops import attention_chunked
from lcx.ops.attention import attention
from lcx.ops.partials import add_sink, merge
from lcx.ops.types import AttentionSpec, Mask, Runs, Segments, contiguous
from lcx.registry import UserError, load
from pallas_kernels import KERNELS, attention_tpu, interpret
from tests import attention_oracle as oracle
from tests.tolerance import assert_close, rms_ratio

IMPLEMENTATIONS = ("reference", "chunked", "mosaic_tpu")
# The arrays are small: compiling is what takes time.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles a side at the sizes of these tests; what only a chip asks of a kernel is for its own tests."""
    monkeypatch.setattr(attention_chunked, "TILE", 16)
    monkeypatch.setattr(attention_tpu, "tile_sizes", lambda dtype: (16, 16))
    monkeypatch.setattr(attention_tpu, "LANES", 8)
    monkeypatch.setattr(attention_tpu, "HEAD_WIDTHS", (4, 5, 8, 128))
    with interpret.interpreted():
        yield


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention call. `breaks` names the traced input whose change must turn the comparison red."""

    mask: Mask = Mask()
    sizes: tuple[int, ...] = (2, 40, 40, 4, 2, 8)  # B S T H G K
    starts_q: tuple[int, ...] = (0,)
    starts_k: tuple[int, ...] = (0,)
    step: int = 1
    documents_q: tuple[tuple[int, ...], ...] | None = None  # lengths by row; the rest of the row is padding
    documents_k: tuple[tuple[int, ...], ...] | None = None
    sink_keys: tuple[int, ...] | None = None
    softcap: float | None = None
    scale: float | None = None
    alibi: bool = False
    sink_logits: bool = False
    breaks: str = "k"


PACKED = ((13, 9, 12), (25, 10))
CASES = {
    "causal": Case(),
    "full": Case(Mask(causal=False)),
    "causal_window": Case(Mask(window=(7, None)), breaks="starts_q"),
    "two_sided_window": Case(Mask(causal=False, window=(5, 9)), breaks="starts_q"),
    "packed_padded": Case(documents_q=PACKED, documents_k=PACKED, breaks="segments_q"),
    "full_packed": Case(Mask(causal=False), documents_q=PACKED, documents_k=PACKED, breaks="segments_k"),
    "sink_tokens": Case(Mask(window=(6, 0), sink_tokens=3), documents_q=PACKED, documents_k=PACKED),
    "sink_tokens_two_sided": Case(Mask(causal=False, window=(3, 2), sink_tokens=2)),
    "sink_keys_given": Case(
        Mask(window=(3, 0), sink_tokens=2), starts_q=(60,), starts_k=(30,), sink_keys=(4, 5), breaks="sink_BT"
    ),
    "sink_logits": Case(Mask(window=(4, 0)), sink_logits=True, breaks="sink_logits"),
    "softcap": Case(softcap=1.5, scale=0.7, breaks="q"),
    "alibi": Case(alibi=True, softcap=3.0, sizes=(1, 40, 40, 6, 2, 8), breaks="slopes"),
    "multi_query_odd": Case(sizes=(1, 37, 37, 3, 1, 5), breaks="v"),
    "one_token": Case(sizes=(2, 1, 19, 2, 2, 4), starts_q=(18,)),
    "longer_keys": Case(sizes=(1, 21, 50, 2, 2, 8), starts_q=(20,), breaks="starts_q"),
    "zigzag": Case(starts_q=(40, 100), starts_k=(20, 120), documents_q=PACKED, documents_k=PACKED, breaks="starts_k"),
    "striped": Case(Mask(window=(50, 0)), starts_q=(2,), starts_k=(3,), step=4, breaks="starts_k"),
    "empty_rows": Case(starts_q=(10,), starts_k=(30,), sink_logits=True),
    "no_key_at_all": Case(starts_k=(100,), breaks="starts_q"),
    "everything": Case(
        Mask(window=(9, 0), sink_tokens=2),
        sizes=(2, 39, 39, 4, 2, 8),
        documents_q=PACKED,
        documents_k=PACKED,
        softcap=2.0,
        scale=0.5,
        alibi=True,
        sink_logits=True,
        breaks="slopes",
    ),
}


def segment_ids(documents, length):
    if documents is None:
        return None
    rows = [np.repeat(np.arange(1, len(row) + 1), row) for row in documents]
    return np.stack([np.pad(row, (0, length - len(row))) for row in rows]).astype(np.int32)


@functools.cache
def inputs_of(case):
    B, S, T, H, G, K = case.sizes
    random = np.random.default_rng(0)
    normal = lambda *shape: random.normal(size=shape).astype(np.float32)
    inputs = dict(q=normal(B, S, H, K), k=normal(B, T, G, K), v=normal(B, T, G, K))
    inputs |= dict(starts_q=np.array(case.starts_q, np.int32), starts_k=np.array(case.starts_k, np.int32))
    if case.documents_q:
        inputs |= dict(segments_q=segment_ids(case.documents_q, S), segments_k=segment_ids(case.documents_k, T))
    if case.sink_keys is not None:
        inputs["sink_BT"] = np.tile(np.isin(np.arange(T), case.sink_keys), (B, 1))
    if case.alibi:
        inputs["slopes"] = 2.0 ** -np.arange(1, H + 1, dtype=np.float32)
    if case.sink_logits:
        inputs["sink_logits"] = normal(H)
    return inputs, normal(B, S, H, K), normal(B, H, S)


def orders(case, inputs):
    _, S, T, *_ = case.sizes
    make = lambda starts, length: Runs(jnp.asarray(starts), length // len(starts), case.step)
    return make(inputs["starts_q"], S), make(inputs["starts_k"], T)


def lcx_attention(case, implementation, inputs, **options):
    order_q, order_k = orders(case, inputs)
    given = dict(order_q=order_q, order_k=order_k, sink_BT=inputs.get("sink_BT"))
    given |= dict(segments_q_BS=inputs.get("segments_q"), segments_k_BT=inputs.get("segments_k"))
    given |= dict(alibi_slopes_H=inputs.get("slopes"), sink_logits_H=inputs.get("sink_logits"))
    options = dict(mask=case.mask, scale=case.scale, softcap=case.softcap, return_lse=True) | options
    return attention(inputs["q"], inputs["k"], inputs["v"], **given, **options, implementation=implementation)


DIFFERENTIATED = ("q", "k", "v", "sink_logits")


def results_of(f, inputs, do, dlse):
    """{name: array} of values and gradients of f(differentiated inputs) -> (o, lse)."""
    wrt = {name: inputs[name] for name in DIFFERENTIATED if name in inputs}

    def loss(wrt):
        o, lse = f(wrt)
        finite = lse != -jnp.inf
        return jnp.sum(o * do) + jnp.sum(jnp.where(finite, lse, 0.0) * dlse), (o, lse)

    grads, (o, lse) = jax.grad(loss, has_aux=True)(wrt)
    return dict(o=o, lse=lse) | {"d" + name: g for name, g in grads.items()}


@functools.partial(jax.jit, static_argnames=("scale", "softcap"), compiler_options=QUICK)
def oracle_results(inputs, slopes, visible, distance, do, dlse, *, scale, softcap):
    values = lambda x: (x["q"], x["k"], x["v"], x.get("sink_logits"))
    f = lambda x: oracle.attention(*values(x), slopes, visible, distance, scale=scale, softcap=softcap)
    return results_of(f, inputs, do, dlse)


def expected_from(case, inputs, do, dlse):
    B, S, T, *_, K = case.sizes
    order_q, order_k = (np.asarray(x.order()) for x in orders(case, inputs))
    segments = (inputs.get("segments_q", np.ones((B, S))), inputs.get("segments_k", np.ones((B, T))))
    visible = oracle.visible_BST(case.mask, order_q, order_k, *segments, inputs.get("sink_BT"))
    distance = np.abs(order_q[:, None] - order_k[None, :]).astype(np.float32)
    wrt = {n: inputs[n] for n in DIFFERENTIATED if n in inputs}
    scale = K**-0.5 if case.scale is None else case.scale
    return oracle_results(wrt, inputs.get("slopes"), visible, distance, do, dlse, scale=scale, softcap=case.softcap)


@functools.cache
def expected_of(case):
    return expected_from(case, *inputs_of(case))


def compiled(case, implementation):
    _, do, dlse = inputs_of(case)
    results = lambda inputs: results_of(lambda wrt: lcx_attention(case, implementation, inputs | wrt), inputs, do, dlse)
    return jax.jit(results, compiler_options=QUICK)


def compare(actual, expected):
    for name, value in expected.items():
        a, e = np.asarray(actual[name]), np.asarray(value)
        if name == "lse":
            np.testing.assert_array_equal(a == -np.inf, e == -np.inf)
            a, e = (np.where(x == -np.inf, 0, x) for x in (a, e))
        assert_close(a, e, name=name, gradient=name.startswith("d"))


def broken(inputs, name):
    x = inputs[name]
    if name.startswith("starts"):
        return inputs | {name: x + (1 if name == "starts_q" and x[0] else -90 if name == "starts_k" and x[0] > 90 else 3)}
    if name.startswith("segments"):
        return inputs | {name: np.roll(x, 1, axis=1)}
    if name == "sink_BT":
        return inputs | {name: np.roll(x, 1, axis=1)}
    x = x.copy()
    x.flat[0] *= 1.01
    return inputs | {name: x}


FOR_THE_REFERENCE = ("two_sided_window", "sink_tokens", "sink_keys_given", "zigzag", "empty_rows", "longer_keys", "everything")


# Cases whose every feature another one of a kernel, slow to interpret, has as well.
INSIDE_OTHERS = ("full", "causal_window", "full_packed", "sink_tokens", "sink_logits", "softcap", "longer_keys", "empty_rows")


@pytest.mark.parametrize(
    ("name", "implementation"),
    [(name, "chunked") for name in CASES]
    + [(name, "reference") for name in FOR_THE_REFERENCE]
    + [pytest.param(name, "mosaic_tpu", marks=pytest.mark.slow if name in INSIDE_OTHERS else []) for name in CASES],
)
def test_equals_the_oracle(name, implementation):
    case = CASES[name]
    run, inputs = compiled(case, implementation), inputs_of(case)[0]
    compare(run(inputs), expected_of(case))
    with pytest.raises(AssertionError):  # and can fail: one input changed a little
        if name == "no_key_at_all":
            inputs = inputs | dict(starts_q=inputs["starts_q"] + 70)
            compare(run(inputs), expected_of(case))
        else:
            compare(run(broken(inputs, case.breaks)), expected_of(case))


@pytest.mark.parametrize("implementation", ["chunked", "mosaic_tpu"])
def test_rows_without_keys_are_zero(implementation):
    case = CASES["no_key_at_all"]
    results = compiled(case, implementation)(inputs_of(case)[0])
    assert np.all(np.asarray(results["lse"]) == -np.inf)
    for name in ("o", "dq", "dk", "dv"):
        assert not np.any(np.asarray(results[name])), name


@pytest.mark.parametrize("implementation", ["chunked", "mosaic_tpu"])
def test_padding_in_the_middle_of_a_document(implementation):
    """Tiles without padding, a tile of nothing else, and tiles without again: the last see the first, and not the one between."""
    case = Case(sizes=(1, 64, 64, 2, 1, 8), documents_q=((64,),), documents_k=((64,),))
    inputs, do, dlse = inputs_of(case)
    ids = np.where((np.arange(64) >= 20) & (np.arange(64) < 41), 0, 1).astype(np.int32)[None]
    inputs = inputs | dict(segments_q=ids, segments_k=ids)
    compare(prepared(case, implementation)(inputs), expected_from(case, inputs, do, dlse))


STATIC = (
    Case(sizes=(2, 24, 24, 2, 1, 4), starts_q=(0, 0), starts_k=(0, 0), documents_q=PACKED),
    Case(Mask(window=(6, 0), sink_tokens=2), sizes=(2, 23, 36, 2, 2, 4), documents_q=PACKED),
    Case(Mask(causal=False, window=(None, 5)), sizes=(2, 24, 37, 2, 1, 4), documents_q=PACKED, step=2),
)
prepared = functools.cache(compiled)


@st.composite
def rows_of_documents(draw, length):
    """Two rows of document ids: non-decreasing, then padding."""
    rows = []
    for _ in range(2):
        cuts = sorted(draw(st.lists(st.integers(0, length), min_size=1, max_size=4)))
        ids = np.searchsorted(cuts, np.arange(length), side="right") + 1
        rows.append(np.where(np.arange(length) < length - draw(st.integers(0, length // 2)), ids, 0))
    return np.stack(rows).astype(np.int32)


@pytest.mark.parametrize("implementation", ["chunked", "mosaic_tpu"])
@settings(max_examples=24, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_order_and_documents(implementation, data):
    case = data.draw(st.sampled_from(STATIC))
    _, S, T, *_ = case.sizes
    starts = lambda side: np.array([data.draw(st.integers(0, 60)) for _ in side], np.int32)
    order = dict(starts_q=starts(case.starts_q), starts_k=starts(case.starts_k))
    documents = dict(segments_q=data.draw(rows_of_documents(S)), segments_k=data.draw(rows_of_documents(T)))
    flags = np.array([[data.draw(st.booleans()) for _ in range(T)]] * 2) if case.mask.sink_tokens else None
    base, do, dlse = inputs_of(dataclasses.replace(case, documents_q=None))
    inputs = base | order | documents | ({} if flags is None else dict(sink_BT=flags))
    run = prepared(dataclasses.replace(case, documents_q=None), implementation)
    compare(run(inputs), expected_from(case, inputs, do, dlse))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bf16(implementation):
    case = CASES["everything"]
    inputs, do, dlse = inputs_of(case)
    half = {n: x.astype(jnp.bfloat16) if n in "qkv" else x for n, x in inputs.items()}
    rounded = {n: x.astype(np.float32) for n, x in half.items() if n in "qkv"}
    do = do.astype(jnp.bfloat16)
    f = lambda wrt: (lcx_attention(case, implementation, half | wrt, return_lse=False), jnp.zeros_like(dlse))
    actual = jax.jit(lambda x: results_of(f, x, do, dlse), compiler_options=QUICK)(half)
    expected = expected_from(case, inputs | rounded, do.astype(np.float32), dlse * 0)
    for name in ("o", "dq", "dk", "dv"):
        assert actual[name].dtype == jnp.bfloat16
        assert_close(actual[name], expected[name], name=name, gradient=name != "o", dtype="bfloat16")
    assert actual["dsink_logits"].dtype == jnp.float32
    assert rms_ratio(actual["o"], expected_of(CASES["softcap"])["o"][:, :39]) > 0.1


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_partials_over_slices_of_the_keys_add_up(implementation):
    """forward with a carry, merge, and backward under the logsumexp over all keys: what a ring does."""
    backend = load(KERNELS["attention"], implementation, field="implementation")
    case = Case(sizes=(1, 40, 40, 2, 1, 4))
    inputs, do, dlse = inputs_of(case)
    expected = expected_of(case)
    q, k, v = (jnp.asarray(inputs[n]) for n in "qkv")
    spec, none = AttentionSpec(Mask(), 4**-0.5), Segments(None, None)
    parts = [(slice(24, 40), 24), (slice(0, 24), 0)]
    length = lambda part: part[0].stop - part[0].start
    side = lambda part: dict(spec=spec, order_q=contiguous(40), order_k=contiguous(length(part), part[1]), segments=none)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(q, k, v):
        first, second = (backend.forward(q, k[:, p[0]], v[:, p[0]], **side(p)) for p in parts)
        chained = backend.forward(q, k[:, parts[1][0]], v[:, parts[1][0]], **side(parts[1]), carry=first)
        delta = jnp.einsum("bshk,bshk->bhs", do, chained[0]) - dlse
        grads = [backend.backward(q, k[:, p[0]], v[:, p[0]], do, chained[1], delta, **side(p)) for p in parts]
        return first, merge(*first, *second), chained, grads

    first, merged, chained, grads = run(q, k, v)
    for o, lse in (merged, chained):
        assert_close(o, expected["o"])
        assert_close(lse, expected["lse"])
    assert_close(grads[0][0] + grads[1][0], expected["dq"], gradient=True)
    for index, name in ((1, "dk"), (2, "dv")):
        assert_close(jnp.concatenate([grads[1][index], grads[0][index]], axis=1), expected[name], name=name, gradient=True)
    with pytest.raises(AssertionError):
        assert_close(merge(*first, *first)[0], expected["o"])


def test_merging_and_sinks_have_finite_gradients_at_empty_rows():
    o, lse = jnp.ones((1, 3, 1, 2)), jnp.array([[[-jnp.inf, -jnp.inf, 0.5]]])
    nothing = jnp.full((1, 1, 3), -jnp.inf)

    def f(o, lse, sink):
        total, total_lse = merge(o, lse, o * 0, nothing)
        total, total_lse = merge(total, total_lse, o * 0, lse)
        total, with_sink = add_sink(total, total_lse, sink)
        return total.sum() + jnp.where(with_sink == -jnp.inf, 0.0, with_sink).sum()

    gradient = jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2)), compiler_options=QUICK)
    for sink in (0.3, -jnp.inf):
        value, grads = gradient(o, lse, jnp.array([sink]))
        assert np.isfinite(value)
        assert all(np.isfinite(np.asarray(g)).all() for g in grads)
    o_merged, lse_merged = merge(o * 0, nothing, o * 0, nothing)
    assert not np.any(o_merged) and np.all(lse_merged == -jnp.inf)


@pytest.mark.parametrize("hidden_by", ["causal", "window", "documents"])
def test_tiles_that_the_mask_empties_are_not_touched(hidden_by):
    """NaN in a tile that is computed spreads even where it is masked (0 * NaN); in a tile that is skipped it cannot."""
    mask = Mask(window=(8, 0)) if hidden_by == "window" else Mask()
    q, k, v = (jax.random.normal(key, (1, 64, 2, 4)) for key in jax.random.split(jax.random.key(0), 3))
    segments = jnp.repeat(jnp.array([[1, 2]], jnp.int32), 32, axis=1) if hidden_by == "documents" else None
    queries, poisoned = (slice(0, 32), slice(32, 64)) if hidden_by == "causal" else (slice(32, 64), slice(0, 16))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def outputs(k, v):
        f = lambda q, k, v: attention(q, k, v, mask=mask, segments_q_BS=segments, segments_k_BT=segments)[:, queries]
        o, pull = jax.vjp(f, q, k, v)
        # Queries outside the slice get no cotangent, but a NaN would still reach dk and dv through their products.
        return o, pull(jnp.ones_like(o))[0][:, queries]

    spoil = lambda x, where: x.at[:, where].set(jnp.nan)
    for x in outputs(spoil(k, poisoned), spoil(v, poisoned)):
        assert np.isfinite(np.asarray(x)).all()
    inside = slice(15, 16) if hidden_by == "causal" else slice(63, 64)  # masked for most of these queries, in a visible tile
    assert not np.isfinite(np.asarray(outputs(k, spoil(v, inside))[0])).all()


def test_a_million_tokens_compile_in_linear_memory(monkeypatch):
    monkeypatch.setattr(attention_chunked, "TILE", 256)
    x = jax.ShapeDtypeStruct((1, 2**20, 2, 8), jnp.float32)
    f = lambda q, k, v: attention(q, k, v, mask=Mask(window=(4095, 0))).sum()
    memory = jax.jit(jax.grad(f, argnums=(0, 1, 2))).lower(x, x, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 16 * 2**20 * 2 * 8 * 4


def test_a_remat_policy_can_save_the_result():
    q = jax.ShapeDtypeStruct((1, 40, 2, 8), jnp.float32)

    def loops(policy):
        f = jax.checkpoint(lambda q: jnp.sin(attention(jnp.sin(q), q, q, mask=Mask())).sum(), policy=policy)
        return len(re.findall(r"stablehlo\.while", jax.jit(jax.value_and_grad(f)).lower(q).as_text()))

    policies = jax.checkpoint_policies
    saved = loops(policies.save_only_these_names("attention_out", "attention_lse"))
    assert saved == loops(policies.everything_saveable) < loops(policies.nothing_saveable)


@pytest.mark.parametrize("implementation", ["chunked", "mosaic_tpu"])
def test_deterministic_and_the_same_with_and_without_gradient(implementation):
    case = CASES["sink_tokens"]
    inputs = inputs_of(case)[0]
    run = compiled(case, implementation)
    first, second = run(inputs), run(inputs)
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])
    o, lse = jax.jit(lambda x: lcx_attention(case, implementation, x), compiler_options=QUICK)(inputs)
    assert rms_ratio(o, first["o"]) < 1e-7


def test_int_orders_are_for_the_reference():
    case = CASES["zigzag"]
    inputs = inputs_of(case)[0]
    order_q, order_k = (x.order() for x in orders(case, inputs))
    options = dict(mask=case.mask, order_q=order_q, order_k=order_k)
    options |= dict(segments_q_BS=jnp.asarray(inputs["segments_q"]), segments_k_BT=jnp.asarray(inputs["segments_k"]))
    f = lambda q: attention(q, inputs["k"], inputs["v"], **options, implementation="reference")
    assert_close(jax.jit(f)(inputs["q"]), expected_of(case)["o"])
    with pytest.raises(UserError, match="chunked: order_q is an array"):
        attention(inputs["q"], inputs["k"], inputs["v"], **options)
