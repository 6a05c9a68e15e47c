"""Attention over a mesh is as exact on 32 devices as on 2."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.ops.attention import attention
from lcx.parallel import ring
from lcx.parallel.attention import context_attention
from lcx.parallel.layouts import sequence_permutation
from tests.contracts.context_attention_cases import Case, place
from tests.tolerance import rms_ratio

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
    placed = {name: place(name, x.astype(dtype) if name in "qkv" else x, mesh, index) for name, x in arrays.items()}

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
