"""The Triton kernels of state-space duality compiled ahead of time for an H100: no GPU is needed (make check-cuda).

ptxas says what each kernel takes, and its instructions are counted. Run as a program, this file compiles the case that it is
given.
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
from lcx.planning.kernel_counts import gpu_ssd
from lcx.planning.kernels import GPU, compile_ssd
from lcx.planning.sass import Code, of_program
from tests.cuda.installed import needs_cuda

pytestmark = needs_cuda

# x of 2^31 numbers and more, so that 32 bits do not count them.
CASES = {
    "K=64, N=128": {},
    "K=128, N=128": dict(K=128),
    "K=64, N=256": dict(N=256),
    "K=64, N=128, float32": dict(dtype="float32"),
}
# Instructions of a warp for a token and head at K=64, N=128, bf16, packed documents: those of the loop over chunks (`maps`: over
# heads; `pairs` has none) by the warps of a program, over the tokens of a chunk. Triton 3.9.0, ptxas 13.5. Every fourth chunk
# writes its state, and 17 of the instructions of `forward` are for that alone.
MEASURED = dict(stretch=35.0, forward=88.0, states=34.3, gradients=69.5, pairs=118.5, maps=35.5, backward=257.7)
KERNELS = MEASURED.keys() - {"backward"}  # which is the sum of four
MARGIN = 1.05
OVER_DEVICES, MEASURED_MIB = "over devices", 3498
# Bytes stored at most. fp32 products are three of TF32, whose operands leave few registers for anything else.
SPILLS = {"K=64, N=256": 8, "K=64, N=128, float32": 2560}


def compile_over_devices() -> jax.stages.Compiled:
    """Four GPUs share a row: states are passed on, and their gradients back."""
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
        return jax.jit(jax.grad(loss, argnums=range(6))).lower(*arrays, array(1, S, dtype=jnp.int32)).compile()


@functools.cache
def compiled(case: str, width: int = 0) -> tuple[dict[str, list[Code]], int]:
    """By kernel what the assembler made of it; bytes of temporary memory."""
    found, printed = of_program("tests.cuda.test_ssd_triton_compiles", case, str(width))
    return found, int(printed.splitlines()[-1])


def products(code: Code) -> int:
    """Instructions of the matrix units."""
    return code.instructions["HGMMA"] + code.instructions["HMMA"]


@pytest.mark.parametrize("case", CASES)
def test_compiles_on_the_matrix_units_and_without_spills(case, capsys):
    found, _ = compiled(case)
    assert found.keys() == KERNELS
    with capsys.disabled():
        for name, codes in found.items():
            for code in codes:
                print(
                    f"\n{case}: {name}: {code.registers} registers, {code.spilled} bytes spilled, {products(code)} products",
                    end="",
                )
    for name, codes in found.items():
        assert all(code.spilled <= SPILLS.get(case, 0) for code in codes), name
        assert all(products(code) > 0 for code in codes), name


def test_instructions_of_a_token_and_head():
    counts = gpu_ssd(compiled("K=64, N=128")[0])
    for name, count in (counts.pop("parts") | counts).items():
        assert count <= MARGIN * MEASURED[name], name


def test_four_gpus_share_a_row_by_auto(capsys):
    """A million tokens, 32 heads of 64, N=128: bf16 x of a device is 1 GiB, and the states that are kept another."""
    found, size = compiled(OVER_DEVICES)
    with capsys.disabled():
        print(f"\n{OVER_DEVICES}: {size / 2**20:.0f} MiB", end="")
    assert found.keys() == KERNELS
    assert size <= MARGIN * MEASURED_MIB * 2**20


def test_a_state_too_large_for_the_registers_is_noticed():
    """Heads of 128 in one program of one warpgroup."""
    (code,) = compiled("K=128, N=128", width=128)[0]["forward"]
    assert code.spilled > 0


if __name__ == "__main__":
    from pallas_kernels import ssd_triton_cut

    ssd_triton_cut.WIDTH = int(sys.argv[2]) or ssd_triton_cut.WIDTH
    sizes = dict(target=GPU, S=2**20, H=32, K=64, G=1, N=128)
    case = CASES.get(sys.argv[1])
    program = compile_over_devices() if case is None else compile_ssd(**sizes | case)
    print(program.memory_analysis().temp_size_in_bytes)
