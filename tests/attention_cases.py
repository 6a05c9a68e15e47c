"""Calls of attention with every feature, and what the oracle says of each, for `test_attention_ops`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from lcx.ops.attention import attention
from lcx.ops.types import Mask, Runs
from tests import attention_oracle as oracle
from tests.tolerance import assert_close

# The arrays are small: compiling is what takes time.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


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
    "cyclic": Case(
        sizes=(2, 128, 128, 2, 1, 8),
        starts_q=tuple(range(16, 512, 32)),
        starts_k=tuple(range(12, 512, 32)),
        documents_q=((50, 40, 30), (128,)),
        documents_k=((50, 40, 30), (120,)),
        breaks="starts_q",
    ),
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
