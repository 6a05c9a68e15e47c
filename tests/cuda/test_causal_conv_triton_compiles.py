"""The Triton kernels of the convolution compiled ahead of time for an H100: registers, spills, instructions, memory.

Run as a program, this file compiles the case that it is given.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lcx.mesh import make_mesh
from lcx.ops.causal_conv import causal_conv
from lcx.ops.dispatch import recording
from lcx.parallel import recurrences
from lcx.planning.gpus import h100s
from lcx.planning.kernels import GPU, Target
from lcx.planning.sass import Code, of_program
from pallas_kernels import causal_conv_triton
from tests.cuda.installed import needs_cuda

pytestmark = needs_cuda

MILLION = 2**20
CASES = {
    "packed": dict(),
    "plain": dict(packed=False),
    "float32": dict(dtype="float32"),
    "7_taps": dict(W=7),
    "tails": dict(S=MILLION - 5, E=2000),
    "4_billion_numbers": dict(S=2**22, E=1024),
}


def compile_case(S=MILLION, E=2048, W=4, dtype="bfloat16", packed=True) -> jax.stages.Compiled:
    """Gradients of a row, with rows in front of it, by what `auto` takes."""
    target = Target(GPU)
    x, initial = target.array(1, S, E, dtype=dtype), target.array(1, W - 1, E, dtype=dtype)
    segments = target.array(1, S, dtype="int32") if packed else None

    def passes(x, w, bias, initial, segments, dy):
        run = lambda x, w, bias, initial: causal_conv(x, w, bias, segments_BS=segments, initial_BWE=initial, activation="silu")
        (y, _), pull = jax.vjp(run, x, w, bias, initial)
        return y, pull((dy, jnp.zeros_like(initial)))

    with recording(require=dict(causal_conv="triton")):
        return target.compile(passes, x, target.array(E, W), target.array(E), initial, segments, x)


def compile_over_devices() -> jax.stages.Compiled:
    """Four GPUs share a row: `auto` takes the kernels, rows are handed on, and their gradients back."""
    mesh = make_mesh(seq=4, devices=h100s(4))
    spread = NamedSharding(mesh, PartitionSpec(None, "seq"))
    x = jax.ShapeDtypeStruct((1, 2**18, 2048), jnp.bfloat16, sharding=spread)
    segments = jax.ShapeDtypeStruct((1, 2**18), jnp.int32, sharding=spread)
    w = jax.ShapeDtypeStruct((2048, 4), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))

    def loss(x, w, segments):
        y = recurrences.causal_conv(x, w, mesh=mesh, segments_BS=segments, activation="silu")
        return (y.astype(jnp.float32) ** 2).sum()

    with jax.set_mesh(mesh), recording(require=dict(causal_conv="triton")):
        return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, w, segments).compile()


@functools.cache
def compiled(name: str) -> tuple[dict[str, Code], int]:
    """By kernel what the assembler made of it; bytes of temporary memory."""
    found, printed = of_program("tests.cuda.test_causal_conv_triton_compiles", name, timeout=500)
    return {kernel: code for kernel, (code,) in found.items()}, int(printed.splitlines()[-1])


@pytest.mark.parametrize("name", [*CASES, "over_devices"])
def test_compiles_without_spills(name):
    kernels, _ = compiled(name)
    assert set(kernels) == {"forward", "backward"}
    for kernel, code in kernels.items():
        assert code.spilled == 0, (kernel, code.spilled)


def test_instructions():
    """For each token and channel, with documents and without; the twin: they are not far fewer either."""
    elements = causal_conv_triton.UNROLLED * causal_conv_triton.BLOCK / 32  # of one turn of the loop, over the threads of a warp
    for name, counts in {
        "packed": dict(forward=20.6, backward=37.7),
        "plain": dict(forward=13.6, backward=28.0),
    }.items():
        for kernel, expected in counts.items():
            loop = compiled(name)[0][kernel].longest()
            assert loop.executed() / elements == pytest.approx(expected, rel=0.03), (name, kernel)
            # A load and a store of 4 channels for each array and token; a word for each token.
            arrays = dict(forward=1, backward=2)[kernel] + (name == "packed")
            assert loop.instructions["LDG"] == causal_conv_triton.UNROLLED * arrays
            assert loop.instructions["STG"] == causal_conv_triton.UNROLLED


def test_memory_for_a_million_tokens():
    """Sums by stretch and words by token, a hundredth of x; nothing else, though rows in front are given."""
    assert compiled("packed")[1] <= 0.03 * 2 * MILLION * 2048


if __name__ == "__main__":
    program = compile_over_devices() if sys.argv[1] == "over_devices" else compile_case(**CASES[sys.argv[1]])
    print(program.memory_analysis().temp_size_in_bytes)
