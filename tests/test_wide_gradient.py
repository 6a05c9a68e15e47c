"""Gradients that add up in fp32 while the loop reads bf16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.wide_gradient import joined, widen

CHUNKS = 256


def gradient(wide: bool):
    """d/dw of sum_i f(w * x_i) over many chunks, and the compiled text."""
    w = jnp.full((64,), 1.0, jnp.bfloat16)
    x_NC = jax.random.uniform(jax.random.key(0), (CHUNKS, 64), jnp.float32).astype(jnp.bfloat16)

    def loss(w):
        values, sums = widen({"w": w}) if wide else ({"w": w}, None)

        def body(total, x_C):
            w_C = (joined(values, sums) if wide else values)["w"]
            return total + jnp.sum((w_C * x_C).astype(jnp.float32)), None

        return jax.lax.scan(body, jnp.float32(0), x_NC)[0]

    exact = np.asarray(x_NC, np.float64).sum(0)
    found = jax.grad(loss)(w)
    assert found.dtype == jnp.bfloat16
    return np.max(np.abs(np.asarray(found, np.float64) - exact) / exact)


def test_the_gradient_is_rounded_once():
    assert gradient(wide=True) <= 2**-8


def test_without_it_every_chunk_rounds():
    assert gradient(wide=False) > 2**-6


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int32, jnp.bool_])
def test_what_needs_no_widening_is_left_alone(dtype):
    x = jnp.ones((3,), dtype)
    values, sums = widen([x])
    assert sums == [None] and joined(values, sums)[0] is x


def temporary_bytes(read_sums: bool) -> int:
    """Of a loop over a bf16 array of 2^20 elements, without a gradient."""

    def run(w):
        values, sums = widen(w)
        extra = lambda: jax.lax.optimization_barrier(sums[0])[0] if read_sums else 0.0
        return jax.lax.map(lambda i: jnp.max(joined(values, sums)[::512]) * i + extra(), jnp.arange(8.0))

    return jax.jit(run).lower(jax.ShapeDtypeStruct((2**20,), jnp.bfloat16)).compile().memory_analysis().temp_size_in_bytes


def test_the_forward_pass_holds_no_zeros():
    """The fp32 array, 4 MiB, is dropped where no gradient is taken; and is there where something reads it."""
    assert temporary_bytes(read_sums=False) < 2**20 < 2**22 <= temporary_bytes(read_sums=True)
