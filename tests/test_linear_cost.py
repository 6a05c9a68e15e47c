"""Linear mixers cost the same for every token, whatever the length of the row: FLOPs and memory of the compiled layer."""

import functools

import jax
import jax.numpy as jnp
import pytest

from lcx.mesh import make_mesh
from lcx.planning.hlo import executed_flops
from lcx.planning.memory import compiled_bytes
from lcx.planning.training import compile_layer
from tests.experiments import small

LENGTHS = (2**15, 2**22)
OPTIONS = {
    "longnet": dict(mixers__longnet__segments=(256, 4096, 32768), mixers__longnet__dilations=(1, 16, 128)),
    "mamba": {},
    "mamba2": {},
    "blockwise": {},
}


@functools.cache
def cost(mixer: str, length: int) -> dict[str, int]:
    """FLOPs, and temporary bytes, of one mixer with its norm, forward and backward."""
    e = small(pattern=(mixer,), ffn="none", sequence__length=length, model__layers=1, **OPTIONS[mixer])
    program = compile_layer(e, make_mesh())
    return dict(flops=executed_flops(program.as_text()), bytes=compiled_bytes(program)["temporary"])


def spread(mixer: str, what: str, lengths=LENGTHS) -> float:
    """By how much the cost of a token differs over the lengths: 0.02 is 2 %."""
    by_token = [cost(mixer, length)[what] / length for length in lengths]
    return max(by_token) / min(by_token) - 1


@pytest.mark.parametrize("mixer", ["longnet", "mamba", "mamba2"])
def test_a_token_costs_the_same_in_a_long_row(mixer):
    assert spread(mixer, "flops") < 0.02
    assert spread(mixer, "bytes") < 0.02


def test_attention_to_everything_does_not():
    """The twin: four times the keys, four times the scores of a token."""
    assert spread("blockwise", "flops", (2**15, 2**17)) > 2


def test_flops_are_those_of_the_arrays():
    """A loop over 4 products of 8 x 16 by 16 x 32, with a tanh and an addition; one that may end early, of at most 7."""
    a, b = jax.ShapeDtypeStruct((4, 8, 16), jnp.float32), jax.ShapeDtypeStruct((16, 32), jnp.float32)
    known = jax.jit(lambda a, b: jax.lax.map(lambda x: jnp.tanh(x @ b) + 1, a)).lower(a, b).compile().as_text()
    assert executed_flops(known) == 4 * (2 * 8 * 16 * 32 + 2 * 8 * 32)

    def early(a, b):
        return jax.lax.while_loop(lambda s: (s[0] < 7) & (s[1][0, 0] < 9), lambda s: (s[0] + 1, s[1] @ b), (0, a))

    a, b = jax.ShapeDtypeStruct((8, 16), jnp.float32), jax.ShapeDtypeStruct((16, 16), jnp.float32)
    assert executed_flops(jax.jit(early).lower(a, b).compile().as_text()) == 7 * 2 * 8 * 16 * 16
