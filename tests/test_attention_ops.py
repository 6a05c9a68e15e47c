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
from lcx.ops.types import AttentionSpec, Mask, Segments, contiguous
from lcx.registry import UserError, load
from pallas_kernels import KERNELS, attention_tpu, interpret
from tests.attention_cases import (
    CASES,
    PACKED,
    QUICK,
    Case,
    broken,
    compare,
    compiled,
    expected_from,
    expected_of,
    inputs_of,
    lcx_attention,
    orders,
    results_of,
)
from tests.tolerance import assert_close, rms_ratio

IMPLEMENTATIONS = ("reference", "chunked", "mosaic_tpu")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles a side at the sizes of these tests; what only a chip asks of a kernel is for its own tests."""
    monkeypatch.setattr(attention_chunked, "TILE", 16)
    monkeypatch.setattr(attention_tpu, "tile_sizes", lambda dtype: (16, 16))
    monkeypatch.setattr(attention_tpu, "LANES", 8)
    monkeypatch.setattr(attention_tpu, "HEAD_WIDTHS", (4, 5, 8, 128))
    with interpret.interpreted():
        yield


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
