"""Backends that compute whole attention only: what they are told means the mask, and what it does not mean they refuse."""

import functools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.ops import attention_cudnn, attention_tokamax, attention_whole, dispatch
from lcx.ops.attention import attention
from lcx.ops.types import AttentionSpec, Mask, contiguous
from lcx.parallel.attention import context_attention
from lcx.registry import UserError
from tests.tolerance import assert_close

GPU = "NVIDIA A100-SXM4-80GB"
MASKS = {
    "causal": Mask(),
    "full": Mask(causal=False),
    "window": Mask(window=(7, 0)),
    "window_that_hides_nothing": Mask(window=(39, 0)),
    "window_of_two": Mask(window=(1, None)),
    "causal_by_its_window": Mask(causal=False, window=(None, 0)),
}
TWO_SIDED = {
    "two_sided": Mask(causal=False, window=(5, 9)),
    "right_only": Mask(causal=False, window=(None, 4)),
    "left_only": Mask(causal=False, window=(4, None)),
}


@pytest.fixture
def on_gpu(monkeypatch):
    """The dispatcher believes in a GPU; what cuDNN is told is carried out by XLA, whose keywords mean the same."""
    for module in (dispatch, attention_tokamax):
        monkeypatch.setattr(module, "target", lambda: ("gpu", GPU))
    monkeypatch.setattr(attention_cudnn, "IMPLEMENTATION", "xla")
    monkeypatch.setattr(attention_whole, "DTYPES", (jnp.float32, jnp.bfloat16))


@pytest.fixture
def tokamax(monkeypatch):
    """A package of that name with the same keywords, carried out by XLA."""

    def computed(q, k, v, *, logits_soft_cap, implementation, **options):
        assert logits_soft_cap is None and implementation == ("mosaic", "triton")
        return jax.nn.dot_product_attention(q, k, v, **options, implementation="xla")

    module = types.ModuleType("tokamax")
    module.dot_product_attention = computed
    monkeypatch.setitem(sys.modules, "tokamax", module)


def arrays(S=40, T=40, H=4, G=2, K=64, dtype=jnp.float32):
    random = np.random.default_rng(0)
    return [jnp.asarray(random.normal(size=(2, *shape, K)), dtype) for shape in ((S, H), (T, G), (T, G))]


def results(implementation, mask, q, k, v):
    """o, dq, dk, dv."""

    @jax.jit
    def run(q, k, v, do):
        o, pull = jax.vjp(lambda q, k, v: attention(q, k, v, mask=mask, scale=0.2, implementation=implementation), q, k, v)
        return o, *pull(do)

    return run(q, k, v, np.cos(np.arange(q.size, dtype=np.float32)).reshape(q.shape))


def compare(found, expected):
    for name, a, e in zip(("o", "dq", "dk", "dv"), found, expected):
        assert_close(a, e, name=name, gradient=name != "o")


@pytest.mark.parametrize("name", MASKS)
def test_cudnn_is_told_the_mask(on_gpu, name):
    q, k, v = arrays()
    expected = results("reference", MASKS[name], q, k, v)
    compare(results("cudnn", MASKS[name], q, k, v), expected)
    # And can fail: a window of one token more or less, or another value.
    other = Mask(causal=MASKS[name].causal, window=(8, 0)) if MASKS[name].window == (7, 0) else MASKS[name]
    if other == MASKS[name]:
        v = v.at[0, 0].multiply(1.1)
    with pytest.raises(AssertionError):
        compare(results("cudnn", other, q, k, v), expected)


@pytest.mark.parametrize("name", ["window", *TWO_SIDED])
def test_tokamax_is_told_the_mask(on_gpu, tokamax, name):
    mask = (MASKS | TWO_SIDED)[name]
    q, k, v = arrays()
    compare(results("tokamax", mask, q, k, v), results("reference", mask, q, k, v))


def test_tokamax_says_that_it_is_not_installed(on_gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokamax", None)
    with pytest.raises(UserError, match=r"not installed: lcx\[tokamax\]"):
        results("tokamax", Mask(), *arrays())


def test_queries_and_keys_may_differ_in_number_where_nothing_is_hidden(on_gpu):
    given = arrays(S=24)
    full = Mask(causal=False)
    compare(results("cudnn", full, *given), results("reference", full, *given))


ROW = dict(segments_q_BS=jnp.ones((2, 40), jnp.int32), segments_k_BT=jnp.ones((2, 40), jnp.int32))
REFUSED = {
    "document ids only as": dict(**ROW),
    "sink tokens only as": dict(mask=Mask(window=(7, 0), sink_tokens=2)),
    "ALiBi slopes only as": dict(alibi_slopes_H=jnp.ones(4)),
    "whole rows, in order from token 0": dict(order_q=contiguous(40), order_k=contiguous(40)),
    "gives no logsumexp": dict(return_lse=True),
    "learned sinks": dict(sink_logits_H=jnp.ones(4)),
    "has no soft-cap": dict(softcap=3.0),
    r"window=\(5, 9\): it takes windows to the left only": dict(mask=Mask(causal=False, window=(5, 9))),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_cudnn_refuses_what_it_would_compute_otherwise(on_gpu, reason):
    with pytest.raises(UserError, match=reason):
        attention(*arrays(), **(dict(mask=Mask()) | REFUSED[reason]), implementation="cudnn")


@pytest.mark.parametrize(
    "reason,asked",
    [
        ("for NVIDIA GPUs since Ampere and this is TPU v5p", dict(kind="TPU v5p")),
        ("since Ampere and this is NVIDIA GeForce RTX 2080 Ti", dict(kind="NVIDIA GeForce RTX 2080 Ti")),
        ("as many queries as keys, and these are S=64 and T=128", dict(S=64)),
        ("dtype float32; it takes bfloat16 and float16", dict(dtype=jnp.float32)),
        ("head width K=256; on NVIDIA A100-SXM4-80GB it takes multiples of 8 up to 128", dict(K=256)),
        ("head width K=68", dict(K=68)),
        (None, dict(K=256, kind="NVIDIA H200")),
        (None, {}),
    ],
)
def test_cudnn_refuses_by_size(reason, asked):
    asked = dict(S=128, K=64, dtype=jnp.bfloat16, kind=GPU) | asked
    shapes = dict(q=(1, asked["S"], 2, asked["K"]), k=(1, 128, 2, asked["K"]))
    found = attention_cudnn.refuse(AttentionSpec(Mask(), 1.0, whole=True), shapes, dict(q=asked["dtype"]), asked["kind"])
    assert found is None if reason is None else reason in found


def test_auto_does_not_take_what_no_card_has_run(on_gpu):
    with dispatch.recording() as record:
        jax.eval_shape(lambda q, k, v: attention(q, k, v, mask=Mask()), *arrays())
    assert record.winners("attention") == ("chunked",)


def test_rows_on_one_device_of_a_mesh_reach_it(on_gpu, mesh_of):
    """Batch and heads spread; with documents it says why it cannot."""
    mesh, (q, k, v) = mesh_of(data=2, tensor=2), arrays()
    attend = functools.partial(context_attention, mesh=mesh, mask=Mask(), scale=0.2, implementation="cudnn")

    @jax.jit
    def run(q, k, v):
        o, pull = jax.vjp(attend, q, k, v)
        return o, *pull(np.cos(np.arange(q.size, dtype=np.float32)).reshape(q.shape))

    with dispatch.recording({"attention": "cudnn"}):
        found = run(q, k, v)
    compare(found, results("reference", Mask(), q, k, v))
    packed = functools.partial(attend, segments_BS=ROW["segments_q_BS"])
    with pytest.raises(UserError, match="gives no logsumexp"):
        jax.eval_shape(packed, q, k, v)
    # Where its sizes are what it cannot, it names those, not the whole rows that it has.
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="head width K=64"):
        patch.setattr(attention_cudnn, "LARGEST_WIDTH", 32)
        jax.eval_shape(attend, q, k, v)
