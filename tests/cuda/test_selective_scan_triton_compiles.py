"""The Triton kernels of the selective scan compiled ahead of time for an H100: registers, spills, instructions.

Run as a program, this file compiles the case that it is given.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lcx.mesh import make_mesh
from lcx.ops.dispatch import recording
from lcx.parallel import recurrences
from lcx.planning.gpus import h100s
from lcx.planning.kernel_counts import gpu_scan
from lcx.planning.kernels import GPU, compile_selective_scan
from lcx.planning.sass import Code, of_program
from pallas_kernels import selective_scan_triton_cut as cuts
from tests.cuda.installed import needs_cuda

pytestmark = needs_cuda

MILLION = 2**20
CASES = {
    "packed": dict(),
    "plain": dict(plain=True),
    "float32": dict(dtype="float32"),
    "8_states": dict(N=8, E=256, S=65_536),
    "32_states": dict(N=32, E=256, S=65_536),
    "64_states": dict(N=64, E=256, S=65_536),
    "tails": dict(S=MILLION - 5, E=2000),
    "odd": dict(S=65_536, E=255),
    "4_billion_numbers": dict(S=2**22, E=1024),
}


# Bytes that spill all the same, though in front of the loop.
SPILLS = {("tails", "forward"): 4, ("odd", "forward"): 12}


def compile_over_devices() -> jax.stages.Compiled:
    """Four GPUs share a row: `auto` takes the kernels, states are passed on, and their gradients back."""
    mesh = make_mesh(seq=4, devices=h100s(4))
    spread = NamedSharding(mesh, PartitionSpec(None, "seq"))
    token, map_ = (jax.ShapeDtypeStruct((1, 2**18, last), jnp.bfloat16, sharding=spread) for last in (2048, 16))
    weights = [jax.ShapeDtypeStruct(x, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec())) for x in ((2048, 16), (2048,))]

    def loss(u, dt, A, B, C, D, segments):
        return recurrences.selective_scan(u, dt, A, B, C, D, mesh=mesh, segments_BS=segments).astype(jnp.float32).sum()

    arrays = token, token, weights[0], map_, map_, weights[1]
    segments = jax.ShapeDtypeStruct((1, 2**18), jnp.int32, sharding=spread)
    with jax.set_mesh(mesh), recording(require=dict(selective_scan="triton")):
        return jax.jit(jax.grad(loss, argnums=range(6))).lower(*arrays, segments).compile()


@functools.cache
def compiled(name: str) -> tuple[dict[str, list[Code]], int]:
    """By kernel what the assembler made of it; bytes of temporary memory."""
    found, printed = of_program("tests.cuda.test_selective_scan_triton_compiles", name, timeout=500)
    return found, int(printed.splitlines()[-1])


@pytest.mark.parametrize("name", [*CASES, "over_devices"])
def test_compiles_without_spills(name):
    kernels, _ = compiled(name)
    assert set(kernels) == {"forward", "stretch", "backward"}
    for kernel, codes in kernels.items():
        for code in codes:
            assert code.spilled <= SPILLS.get((name, kernel), 0), (kernel, code.spilled)
            assert not any(memory in loop.instructions for loop in code.loops for memory in ("STL", "LDL")), kernel


# Of what `gpu_scan` counts: channels times states, over the 32 threads of a warp.
ELEMENTS = 1024 * 16 / 32


def test_instructions_forward():
    """For each token, channel and state of 16: bf16, with softplus, bias, gate; with and without documents."""
    for name in ("packed", "plain"):
        found = compiled(name)[0]
        counts, (code,) = gpu_scan(found), found["forward"]
        assert counts["forward"] <= 9 * ELEMENTS and counts["stretch"] <= 7 * ELEMENTS
        # One for each state, and two for each channel; the same again in no other loop.
        assert code.longest().instructions["MUFU.EX2"] == cuts.UNROLLED * 2 * (16 + (2 if name == "packed" else 1))
        assert code.registers <= 168


def test_instructions_backward():
    """At most three times forward. Sums stay in threads and go through shared memory: in Gluon by its own passes, where those of
    Triton proper put exchanges between threads into the loops."""
    for name in ("packed", "plain"):
        found = compiled(name)[0]
        counts, loops = gpu_scan(found), found["backward"][0].longest().inside
        assert 2.5 <= counts["backward"] / counts["forward"] <= (3 if name == "packed" else 3.05)
        for loop in loops:
            assert loop.instructions["SHFL"] == 0 and loop.instructions["LDS"] > 0


def test_memory_for_a_million_tokens():
    """States in front of chunks are 1 GiB, parts of dB and dC another; nothing else grows with tokens times channels."""
    assert compiled("packed")[1] <= 2.5 * 2**30


if __name__ == "__main__":
    sizes = dict(target=GPU, S=MILLION, E=2048, N=16, summaries=True)
    case = CASES.get(sys.argv[1])
    program = compile_over_devices() if case is None else compile_selective_scan(**sizes | case)
    print(program.memory_analysis().temp_size_in_bytes)
