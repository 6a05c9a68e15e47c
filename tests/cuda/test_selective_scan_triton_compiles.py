"""The Triton kernels of the selective scan compiled ahead of time for an H100: registers, spills, instructions.

Run as a program, this file compiles the case that it is given; its PTX lands where JAX_TRITON_DUMP_DIR says.
"""

import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lcx.mesh import make_mesh
from lcx.ops.dispatch import recording
from lcx.ops.recurrence import marks
from lcx.ops.selective_scan import Inputs, ScanSpec
from lcx.parallel import recurrences
from pallas_kernels import selective_scan_triton
from pallas_kernels import selective_scan_triton_cut as cuts
from tests.cuda.h100 import h100s, needs_cuda
from tests.cuda.sass import Code, assembled

pytestmark = needs_cuda

ROOT = pathlib.Path(__file__).parent.parent.parent
MILLION = 2**20
CASES = {
    "packed": dict(),
    "plain": dict(packed=False, optional=False),
    "float32": dict(dtype="float32"),
    "64_states": dict(N=64, E=256, S=65_536),
    "tails": dict(S=MILLION - 5, E=2000),
    "4_billion_numbers": dict(S=2**22, E=1024),
}


# Bytes that spill all the same, though in front of the loop.
SPILLS = {("tails", "forward_kernel"): 4}


def compile_case(S=MILLION, E=2048, N=16, dtype="bfloat16", packed=True, optional=True):
    """Both passes and both summaries in one program; returns its temporary memory in bytes."""
    mesh = Mesh(np.array(h100s(1)), ("device",))
    sharding = NamedSharding(mesh, PartitionSpec())
    array = lambda *shape, dtype="float32": jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)
    token, map_ = array(1, S, E, dtype=dtype), array(1, S, N, dtype=dtype)
    given = Inputs(token, token, array(E, N), map_, map_, array(E))
    given = given._replace(z_BSE=token, dt_bias_E=array(E)) if optional else given

    def passes(given, segments, state, dy):
        given, options = given._replace(marks=marks(segments)), dict(spec=ScanSpec())
        y, final, residuals = selective_scan_triton.forward(given, state, **options)
        gradients, dstate = selective_scan_triton.backward(given, residuals, dy, final, **options)
        ends = selective_scan_triton.summary(given, **options), selective_scan_triton.reverse_summary(given, dy, **options)
        return y, gradients._replace(marks=None), dstate, ends

    with jax.set_mesh(mesh):
        lowered = jax.jit(passes).lower(given, array(1, S, dtype="int32") if packed else None, array(1, E, N), token)
        return lowered.compile().memory_analysis().temp_size_in_bytes


def compile_over_devices() -> int:
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
        program = jax.jit(jax.grad(loss, argnums=range(6))).lower(*arrays, segments).compile()
    return program.memory_analysis().temp_size_in_bytes


@functools.cache
def compiled(name: str) -> tuple[dict[str, list[Code]], int]:
    """By kernel what the assembler made of it; bytes of temporary memory. In its own process: where to write is read once."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | dict(JAX_PLATFORMS="cpu", JAX_TRITON_DUMP_DIR=folder, TRITON_INTERPRET="0", XLA_FLAGS="")
        command = [sys.executable, "-m", "tests.cuda.test_selective_scan_triton_compiles", name]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]
        found: dict[str, list[Code]] = {}
        for ptx in sorted(pathlib.Path(folder).rglob("*.ptx")):
            found.setdefault(ptx.stem, []).append(assembled(ptx))
        return found, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", [*CASES, "over_devices"])
def test_compiles_without_spills(name):
    kernels, _ = compiled(name)
    assert set(kernels) == {"forward_kernel", "stretch_kernel", "backward_kernel"}
    for kernel, codes in kernels.items():
        for code in codes:
            assert code.spilled <= SPILLS.get((name, kernel), 0), (kernel, code.spilled)
            assert not any(memory in loop.instructions for loop in code.loops for memory in ("STL", "LDL")), kernel


# Tokens, channels and states of one turn of a loop, over the 32 threads of a warp.
def elements(tokens: int, channels: int) -> float:
    return tokens * channels * 16 / 32


def test_instructions_forward():
    """For each token, channel and state of 16: bf16, with softplus, bias, gate; with and without documents."""
    for name in ("packed", "plain"):
        (code,) = compiled(name)[0]["forward_kernel"]
        loop = max(code.loops, key=lambda loop: loop.instructions.total())
        assert loop.executed(0) <= 9 * elements(cuts.UNROLLED, 64)
        # One for each state, and two for each channel; the same again in no other loop.
        assert loop.instructions["MUFU.EX2"] == cuts.UNROLLED * 2 * (16 + (2 if name == "packed" else 1))
        assert code.registers <= 168


def test_instructions_of_a_stretch():
    for name in ("packed", "plain"):
        for code in compiled(name)[0]["stretch_kernel"]:
            loop = max(code.loops, key=lambda loop: loop.instructions.total())
            assert loop.instructions.total() <= 7 * elements(cuts.UNROLLED, 64)


def test_instructions_backward():
    """Over a chunk: its states once, then its parts, each again and in reverse. The twin: it is over 35."""
    (code,) = compiled("packed")[0]["backward_kernel"]
    loop = max(code.loops, key=lambda loop: loop.instructions.total())
    executed = loop.executed(cuts.CHUNK // cuts.ROWS, cuts.ROWS // cuts.GROUP) / elements(cuts.CHUNK, 32)
    assert 35 <= executed <= 39
    assert [len(part.inside) for part in loop.inside] == [1, 1]


def test_memory_for_a_million_tokens():
    """States in front of chunks are 1 GiB, parts of dB and dC another; nothing else grows with tokens times channels."""
    assert compiled("packed")[1] <= 2.5 * 2**30


if __name__ == "__main__":
    print(compile_over_devices() if sys.argv[1] == "over_devices" else compile_case(**CASES[sys.argv[1]]))
