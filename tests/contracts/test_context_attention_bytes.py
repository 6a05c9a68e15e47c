"""Bytes that attention over a mesh sends, from what XLA compiles, against what each strategy should cost."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from lcx.ops.types import Mask
from lcx.parallel.attention import context_attention
from lcx.planning.schedule import bytes_sent
from lcx.sharding import activation_spec

LENGTH, HEAD, FP32 = 512, 8, 4


def sent(mesh, strategy: str, heads: tuple[int, int], degree: int | None) -> tuple[int, int]:
    """Bytes that a device sends in the forward and in the backward pass of fp32 attention over whole rows.

    Two programs: in one, XLA would keep what the forward pass gathered, as no layer under remat can.
    """

    def shape(dims, count):
        return jax.ShapeDtypeStruct((1, LENGTH, count, HEAD), jnp.float32, sharding=NamedSharding(mesh, activation_spec(dims)))

    def attend(*qkv):
        return context_attention(*qkv, mesh=mesh, strategy=strategy, mask=Mask(), ulysses_degree=degree)

    q, k = shape("BSHK", heads[0]), shape("BTGK", heads[1])
    traced = jax.jit(lambda *qkv: jax.vjp(attend, *qkv)).lower(q, k, k)
    forward = traced.compile()
    placed = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    _, pull = jax.tree.map(placed, traced.out_info, forward.output_shardings)
    backward = jax.jit(lambda pull, do: pull(do)).lower(pull, q).compile()
    return tuple(sum(bytes_sent(program.as_text()).values()) for program in (forward, backward))


def ring(P: int, n: float, H: float, G: float) -> tuple[float, float]:
    """P - 1 hops of K and V; back the same with their gradients, or of q, do, dq and two numbers a query if that is less."""
    hops = (P - 1) * n * FP32
    return hops * 2 * G * HEAD, hops * min(4 * G * HEAD, 3 * H * HEAD + 2 * H)


def exchange(P: int, n: float, H: int, G: int) -> tuple[float, float]:
    """q, k, v there and o, lse back; then q, k, v, do, lse, delta there and dq, dk, dv back; a P-th of each stays."""
    away = (P - 1) / P * n * FP32
    return away * ((2 * H + 2 * G) * HEAD + H), away * ((3 * H + 4 * G) * HEAD + 2 * H)


def allgather(P: int, n: float, H: int, G: int) -> tuple[float, float]:
    """K and V gathered in each pass, and their gradients summed where they belong."""
    away = (P - 1) * n * FP32
    return away * 2 * G * HEAD, away * 4 * G * HEAD


def both(P: int, n: float, H: int, G: int) -> tuple[float, float]:
    """An exchange in pairs, and a ring of half as many places for half of the heads."""
    return tuple(a + b for a, b in zip(exchange(2, n, H, G), ring(P // 2, 2 * n, H / 2, G / 2), strict=True))


FORMULAS = {"ring": ring, "ulysses": exchange, "ulysses_ring": both, "allgather": allgather}


@pytest.mark.parametrize("P", [8] + [pytest.param(P, marks=pytest.mark.slow) for P in (2, 4, 16, 32)])
@pytest.mark.parametrize("heads", [(32, 32), pytest.param((64, 32), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("strategy", FORMULAS)
def test_what_xla_sends_is_within_two_percent_of_the_formula(mesh_of, strategy, heads, P):
    found = sent(mesh_of(seq=P), strategy, heads, 2 if strategy == "ulysses_ring" else None)
    expected = FORMULAS[strategy](P, LENGTH // P, *heads)
    assert found == pytest.approx(expected, rel=0.02)
