"""The Triton kernels of state-space duality compiled ahead of time for an H100: no GPU is needed (make check-cuda).

ptxas says what each kernel takes, and its instructions are counted. Run as a program, this file compiles the case that it is
given and writes what Triton made of the kernels into $JAX_TRITON_DUMP_DIR.
"""

import functools
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton
from jax.sharding import Mesh as DeviceMesh
from jax.sharding import NamedSharding, PartitionSpec

from lcx.mesh import make_mesh
from lcx.ops.dispatch import recording
from lcx.ops.recurrence import marks
from lcx.ops.ssd import Inputs, SsdSpec
from lcx.parallel import recurrences
from tests.cuda import sass
from tests.cuda.h100 import h100s, needs_cuda

pytestmark = needs_cuda

ROOT = pathlib.Path(__file__).parent.parent.parent
NVDISASM = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
# x of 2^31 numbers and more, so that 32 bits do not count them.
CASES = {
    "K=64, N=128": dict(K=64, N=128),
    "K=128, N=128": dict(K=128, N=128),
    "K=64, N=256": dict(K=64, N=256),
    "K=64, N=128, float32": dict(K=64, N=128, dtype=jnp.float32),
}
# Instructions of a warp for a token and head at K=64, N=128, bf16, packed documents: those of the loop over chunks (`maps`: over
# heads; `pairs` has none) by the warps of a program, over the tokens of a chunk. Triton 3.9.0, ptxas 13.5. Every fourth chunk
# writes its state, and 17 of the instructions of `forward` are for that alone.
MEASURED = dict(stretch=35.0, forward=88.0, states=34.3, gradients=69.5, pairs=118.5, maps=35.5)
MARGIN = 1.05
OVER_DEVICES, MEASURED_MIB = "over devices", 3498
# Bytes stored at most. fp32 products are three of TF32, whose operands leave few registers for anything else.
SPILLS = {"K=64, N=256": 8, "K=64, N=128, float32": 2560}


class Kernel(NamedTuple):
    """Bytes of spill stores, registers, instructions, those of matrix units, those of the longest loop without loops in it."""

    spilled: int
    registers: int
    instructions: int
    products: int
    repeated: int


def compile_case(K, N, dtype=jnp.bfloat16, S=2**20, H=32) -> int:
    """Both passes. Bytes of temporary memory."""
    from pallas_kernels import ssd_triton

    mesh = DeviceMesh(np.array(h100s(1)), ("device",))
    array = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))
    x, maps, of_heads, spec = array(1, S, H, K), array(1, S, 1, N), array(H, dtype=jnp.float32), SsdSpec()

    def both(inputs, segments, state, dy):
        inputs = inputs._replace(marks=marks(segments))
        _, final, residuals = forward = ssd_triton.forward(inputs, state, spec=spec)
        return forward, ssd_triton.backward(inputs, residuals, dy, final, spec=spec)

    inputs = Inputs(x, array(1, S, H), of_heads, maps, maps, of_heads, of_heads)
    with jax.set_mesh(mesh):
        state = array(1, H, K, N, dtype=jnp.float32)
        program = jax.jit(both).lower(inputs, array(1, S, dtype=jnp.int32), state, x).compile()
    return program.memory_analysis().temp_size_in_bytes


def compile_over_devices() -> int:
    """Four GPUs share a row: states are passed on, and their gradients back. Bytes of temporary memory."""
    mesh = make_mesh(seq=4, devices=h100s(4))
    spread, whole = (NamedSharding(mesh, PartitionSpec(None, *dims)) for dims in (("seq",), ()))
    array = lambda *shape, dtype=jnp.bfloat16, sharding=spread: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    S, H, of_heads = 2**20, 32, array(32, dtype=jnp.float32, sharding=whole)
    x, maps = array(1, S, H * 64), array(1, S, 128)  # as mixers have them

    def loss(x, dt, A, B, C, D, segments):
        x, B, C = x.reshape(1, S, H, 64), B[:, :, None], C[:, :, None]
        return recurrences.ssd(x, dt, A, B, C, D, mesh=mesh, segments_BS=segments).astype(jnp.float32).sum()

    arrays = x, array(1, S, H), of_heads, maps, maps, of_heads
    with jax.set_mesh(mesh), recording(require=dict(ssd="triton")):
        program = jax.jit(jax.grad(loss, argnums=range(6))).lower(*arrays, array(1, S, dtype=jnp.int32)).compile()
    return program.memory_analysis().temp_size_in_bytes


@functools.cache
def compiled(case: str, width: int = 0) -> tuple[dict[str, Kernel], int]:
    """By kernel; bytes of temporary memory. In its own process: whether Triton compiles is decided when it is imported."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | dict(JAX_PLATFORMS="cpu", TRITON_INTERPRET="0", JAX_TRITON_DUMP_DIR=folder, XLA_FLAGS="")
        command = [sys.executable, "-m", "tests.cuda.test_ssd_triton_compiles", case, str(width)]
        printed = subprocess.run(
            command, cwd=ROOT, env=environment, check=True, timeout=900, stdout=subprocess.PIPE, text=True
        ).stdout
        found = {}
        for path in pathlib.Path(folder).glob("*/*_kernel.ptx"):
            kernel, name = assembled(path), path.stem.removesuffix("_kernel")
            found[name] = max(kernel, found.get(name, kernel))  # the stretch in both directions
        return found, int(printed.splitlines()[-1])


def assembled(ptx: pathlib.Path) -> Kernel:
    code = sass.assembled(ptx)
    listing = subprocess.run([NVDISASM, "-c", ptx.with_suffix(".cubin")], check=True, capture_output=True, text=True).stdout
    names = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", listing)
    innermost = lambda loop: [x for inside in loop.inside for x in innermost(inside)] or [loop.instructions.total()]
    repeated = [count for loop in code.loops for count in innermost(loop)]
    # Those that are there only as what waits for a state in front of a segment are short.
    repeated = max([count for count in repeated if count > 200], default=len(names))
    return Kernel(code.spilled, code.registers, len(names), names.count("HGMMA") + names.count("HMMA"), repeated)


@pytest.mark.parametrize("case", CASES)
def test_compiles_on_the_matrix_units_and_without_spills(case, capsys):
    found, _ = compiled(case)
    assert found.keys() == MEASURED.keys()
    with capsys.disabled():
        for name, kernel in found.items():
            print(f"\n{case}: {name}: {kernel}", end="")
    for name, kernel in found.items():
        assert kernel.spilled <= SPILLS.get(case, 0), name
        assert kernel.products > 0, name


def test_instructions_of_a_token_and_head():
    for name, kernel in compiled("K=64, N=128")[0].items():
        assert kernel.repeated * 4 / 64 <= MARGIN * MEASURED[name], name


def test_four_gpus_share_a_row_by_auto(capsys):
    """A million tokens, 32 heads of 64, N=128: bf16 x of a device is 1 GiB, and the states that are kept another."""
    found, size = compiled(OVER_DEVICES)
    with capsys.disabled():
        print(f"\n{OVER_DEVICES}: {size / 2**20:.0f} MiB", end="")
    assert found.keys() == MEASURED.keys()
    assert size <= MARGIN * MEASURED_MIB * 2**20


def test_a_state_too_large_for_the_registers_is_noticed():
    """Heads of 128 in one program of one warpgroup."""
    assert compiled("K=128, N=128", width=128)[0]["forward"].spilled > 0


if __name__ == "__main__":
    from pallas_kernels import ssd_triton_cut

    ssd_triton_cut.WIDTH = int(sys.argv[2]) or ssd_triton_cut.WIDTH
    print(compile_over_devices() if sys.argv[1] == OVER_DEVICES else compile_case(**CASES[sys.argv[1]]))
