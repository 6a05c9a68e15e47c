"""The Hopper attention kernels in Pallas' GPU interpreter, against the definition.

The interpreter executes copies, barriers, both warpgroups, masks and the products of two operands in shared memory. It does not
execute `mosaic_hopper.add_product`'s last line and checks no order among matrix instructions: tests/cuda compiles them.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from lcx.ops import attention_reference as reference
from lcx.ops.attention import attention
from lcx.ops.types import AttentionSpec, Mask, Runs, Segments, contiguous
from pallas_kernels import attention_hopper, interpret, mosaic_hopper
from tests.tolerance import assert_close

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@pytest.fixture(autouse=True)
def interpreted():
    with interpret.interpreted():
        yield


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of forward, and of backward under its logsumexp. `breaks`: an input whose change must turn it red."""

    mask: Mask = Mask()
    sizes: tuple[int, ...] = (1, 140, 140, 1, 1, 64)  # B S T H G K
    starts_q: tuple[int, ...] = (0,)
    starts_k: tuple[int, ...] = (0,)
    step: int = 1
    documents_q: tuple[int, ...] | None = None  # lengths, of every row alike up to a shift; the rest of a row is padding
    documents_k: tuple[int, ...] | None = None
    softcap: float | None = None
    alibi: bool = False
    carry: bool = False
    dtype: str = "bfloat16"
    breaks: str = "k"


CASES = {
    "causal": Case(sizes=(1, 140, 140, 2, 1, 64)),
    "full_grouped": Case(Mask(causal=False), sizes=(1, 100, 150, 4, 2, 64), breaks="q"),
    "packed_window_sinks": Case(
        Mask(window=(60, 0), sink_tokens=3),
        sizes=(2, 256, 256, 1, 1, 64),
        documents_q=(50, 150, 30),
        documents_k=(50, 150, 30),
        softcap=1.5,
        breaks="segments_k",
    ),
    "sinks_two_sided": Case(Mask(causal=False, window=(20, 10), sink_tokens=2), starts_q=(50,), breaks="sink_BT"),
    "softcap_alibi": Case(softcap=2.0, alibi=True, breaks="slopes"),
    "zigzag": Case(
        sizes=(1, 260, 256, 1, 1, 64),
        starts_q=(200, 900),
        starts_k=(100, 1000),
        documents_q=(120, 100),
        documents_k=(120, 130),
        carry=True,
        breaks="carry_lse",
    ),
    "no_key_at_all": Case(sizes=(1, 128, 128, 1, 1, 64), starts_k=(500,), breaks="starts_k"),
    "striped_128": Case(
        Mask(window=(300, 0)), sizes=(1, 70, 192, 2, 1, 128), starts_q=(202,), starts_k=(3,), step=4, breaks="starts_k"
    ),
    "width_256": Case(sizes=(1, 70, 100, 1, 1, 256), starts_q=(20,), breaks="v"),
    "empty_rows_float16": Case(starts_q=(10,), starts_k=(100,), carry=True, dtype="float16", breaks="carry_o"),
}


def segment_ids(lengths, B, length):
    """B rows, each with its documents a little later than the row before."""
    row = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    row = np.pad(row, (0, length - len(row)))
    return np.stack([np.where(row == 0, 0, np.roll(row, 7 * b) + 1) for b in range(B)]).astype(np.int32)


@functools.cache
def inputs_of(case):
    B, S, T, H, G, K = case.sizes
    random = np.random.default_rng(0)
    normal = lambda *shape: random.normal(size=shape).astype(np.float32)
    half = lambda *shape: normal(*shape).astype(jnp.dtype(case.dtype))
    inputs = dict(q=half(B, S, H, K), k=half(B, T, G, K), v=half(B, T, G, K), do=half(B, S, H, K), dlse=normal(B, H, S))
    inputs |= dict(starts_q=np.array(case.starts_q, np.int32), starts_k=np.array(case.starts_k, np.int32))
    if case.documents_q:
        inputs |= dict(segments_q=segment_ids(case.documents_q, B, S), segments_k=segment_ids(case.documents_k, B, T))
    if case.mask.sink_tokens:
        inputs["sink_BT"] = random.random((B, T)) < 0.02
    if case.alibi:
        inputs["slopes"] = 2.0 ** -np.arange(3, H + 3, dtype=np.float32)
    if case.carry:
        lse = np.where(random.random((B, H, S)) < 0.2, -np.inf, normal(B, H, S) + 4).astype(np.float32)
        inputs |= dict(carry_o=np.where(lse == -np.inf, 0, 1).swapaxes(1, 2)[..., None] * normal(B, S, H, K), carry_lse=lse)
    return inputs


def results(case, backend, inputs):
    """o, lse, dq, dk, dv."""
    _, S, T, *_, K = case.sizes
    order = lambda starts, length: Runs(starts, length // len(starts), case.step)
    options = dict(
        spec=AttentionSpec(case.mask, K**-0.5, case.softcap),
        order_q=order(inputs["starts_q"], S),
        order_k=order(inputs["starts_k"], T),
        segments=Segments(inputs.get("segments_q"), inputs.get("segments_k"), inputs.get("sink_BT")),
        alibi_slopes_H=inputs.get("slopes"),
    )
    qkv = [inputs[name] for name in "qkv"]
    carry = (inputs["carry_o"], inputs["carry_lse"]) if case.carry else None
    o, lse = backend.forward(*qkv, **options, carry=carry)
    delta = jnp.einsum("bshk,bshk->bhs", inputs["do"].astype(jnp.float32), o) - inputs["dlse"]
    delta = jnp.where(lse == -jnp.inf, 0.0, delta)
    dq, dk, dv = backend.backward(*qkv, inputs["do"], lse, delta, **options)
    return dict(o=o, lse=lse, dq=dq, dk=dk, dv=dv)


@functools.cache
def compiled(case, backend):
    return jax.jit(functools.partial(results, case, backend), compiler_options=QUICK)


def compare(actual, expected):
    """Weights and d(score) are rounded to 16 bits before they are multiplied; lse is not."""
    for name, value in expected.items():
        a, e = np.asarray(actual[name]), np.asarray(value)
        assert a.dtype == np.float32, name
        if name == "lse":
            np.testing.assert_array_equal(a == -np.inf, e == -np.inf)
            a, e = (np.where(x == -np.inf, 0, x) for x in (a, e))
            assert_close(a, e, name=name)
        else:
            assert_close(a, e, name=name, gradient=name.startswith("d"), dtype="bfloat16")


def broken(inputs, name):
    x = inputs[name].copy()
    if name.startswith("starts"):
        x += -450 if x[0] == 500 else 3
    elif name.startswith("segments") or name == "sink_BT":
        x = np.roll(x, 1, axis=1)
    elif name == "carry_lse":
        x += np.float32(1e-3)
    elif name == "slopes":
        x *= np.float32(1.001)
    else:
        x.reshape(-1, x.shape[-1])[0] *= 2  # of the first token
        x.reshape(-1, x.shape[-1])[-1] *= 2
    return inputs | {name: x}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name):
    case = CASES[name]
    run, inputs = compiled(case, attention_hopper), inputs_of(case)
    expected = compiled(case, reference)(inputs)
    compare(run(inputs), expected)
    # And can fail: one input changed a little. What the reference makes of that is cheaper to compute than what the kernel does.
    with pytest.raises(AssertionError):
        compare(compiled(case, reference)(broken(inputs, case.breaks)), expected)


def test_rows_without_keys_are_zero():
    case = CASES["no_key_at_all"]
    found = compiled(case, attention_hopper)(inputs_of(case))
    assert np.all(np.asarray(found["lse"]) == -np.inf)
    for name in ("o", "dq", "dk", "dv"):
        assert not np.any(np.asarray(found[name])), name


@pytest.mark.parametrize("starts_k", [(0, 128), (900, 2000)], ids=["past", "future_and_past"])
def test_one_compiled_kernel_serves_every_step_of_a_ring(starts_k):
    case = CASES["zigzag"]
    run, inputs = compiled(case, attention_hopper), inputs_of(case)
    run(inputs)
    inputs = inputs | dict(starts_k=np.array(starts_k, np.int32))
    compare(run(inputs), compiled(case, reference)(inputs))
    assert run._cache_size() == 1


def test_the_public_operation_differentiates_through_it():
    q, k, v = (jax.random.normal(key, (1, 96, 1, 64), jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 3))
    sink = jnp.array([0.3])

    def f(implementation, q, k, v, sink):
        options = dict(mask=Mask(), sink_logits_H=sink, return_lse=True, implementation=implementation)
        o, lse = attention(q, k, v, **options)
        return jnp.sum(jnp.sin(o)) + jnp.sum(lse), o

    def run(implementation):
        differentiate = jax.value_and_grad(functools.partial(f, implementation), argnums=(0, 1, 2, 3), has_aux=True)
        (_, o), grads = jax.jit(differentiate, compiler_options=QUICK)(q, k, v, sink)
        return o, grads

    (o, grads), (expected, expected_grads) = run("mosaic_gpu"), run("reference")
    assert o.dtype == jnp.float32 and [g.dtype for g in grads] == [jnp.bfloat16] * 3 + [jnp.float32]
    assert_close(o, expected, dtype="bfloat16")
    for name, a, e in zip(("dq", "dk", "dv", "dsink"), grads, expected_grads):
        assert_close(a, e, name=name, gradient=True, dtype="bfloat16")


@functools.partial(jax.jit, compiler_options=QUICK)
def causal_forward(q, k, v):
    spec = AttentionSpec(Mask(), 0.125)
    orders = dict(order_q=contiguous(q.shape[1], 100), order_k=contiguous(k.shape[1]))
    return attention_hopper.forward(q, k, v, spec=spec, **orders, segments=Segments(None, None))[0]


def test_tiles_that_the_mask_empties_are_not_touched():
    """NaN in a tile that is computed spreads even where it is masked (0 * NaN); in a tile that is skipped it cannot."""
    q, k, v = (
        jax.random.normal(key, (1, S, 1, 64), jnp.bfloat16)
        for key, S in zip(jax.random.split(jax.random.key(0), 3), (128, 512, 512))
    )
    spoil = lambda where: v.at[:, where].set(jnp.nan)
    assert np.isfinite(np.asarray(causal_forward(q, k, spoil(slice(256, 512))))).all()
    assert not np.isfinite(np.asarray(causal_forward(q, k, spoil(slice(255, 256))))).all()


def races_of(run):
    """Whether a kernel's accesses to shared memory can meet, by the interpreter's vector clocks."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter  # there is no public name

    try:
        with interpret.interpreted(plgpu.InterpretGPUParams(detect_races=True)):
            try:
                jax.block_until_ready(run())
            except RuntimeError as error:  # newer releases raise
                assert "RACE" in str(error).upper()
                return True
        return interpreter.get_races().races_found
    finally:
        interpreter.reset_gpu_interpret_mode_state()


def test_no_races():
    case = Case(sizes=(1, 64, 300, 1, 1, 64), starts_q=(250,), documents_q=(40, 20), documents_k=(220, 70))
    assert not races_of(
        lambda: jax.jit(functools.partial(results, case, attention_hopper), compiler_options=QUICK)(inputs_of(case))
    )


def test_a_race_is_found(monkeypatch):
    """A slot is given back before it is read."""
    receive, release = mosaic_hopper.Ring.receive, mosaic_hopper.Ring.release

    def too_early(ring, t):
        found = receive(ring, t)
        release(ring, t)
        return found

    monkeypatch.setattr(mosaic_hopper.Ring, "receive", too_early)
    monkeypatch.setattr(mosaic_hopper.Ring, "release", lambda ring, t: None)
    case = Case(Mask(causal=False), sizes=(1, 128, 512, 1, 1, 64))
    inputs = inputs_of(case)
    options = dict(spec=AttentionSpec(case.mask, 0.125), order_q=contiguous(128), order_k=contiguous(512))
    forward = lambda q, k, v: attention_hopper.forward(q, k, v, **options, segments=Segments(None, None))
    assert races_of(lambda: jax.jit(forward, compiler_options=QUICK)(*(inputs[name] for name in "qkv")))


REFUSED = {
    "it is for H100, H200, GH200 and this is NVIDIA A100": dict(device_kind="NVIDIA A100"),
    "order_k is an array": dict(shapes=dict(order_k=(128,))),
    "head width K=96; it takes 64, 128, 256": dict(shapes=dict(q=(1, 128, 2, 96))),
    "dtype float32; it takes bfloat16 and float16": dict(dtypes=dict(q=jnp.float32)),
    "k has 2147483648 tokens in all rows": dict(shapes=dict(k=(2, 2**30, 1, 64))),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refuses_with_a_reason(reason):
    def ask(device_kind="NVIDIA H100 80GB HBM3", shapes=None, dtypes=None):
        shapes = dict(q=(1, 128, 2, 64), k=(1, 128, 1, 64), v=(1, 128, 1, 64)) | (shapes or {})
        with interpret.interpreted(False):
            return attention_hopper.refuse(AttentionSpec(Mask(), 1.0), shapes, dict(q=jnp.bfloat16) | (dtypes or {}), device_kind)

    assert ask() is None
    assert ask(**REFUSED[reason]).startswith(reason)
