"""The Hopper attention kernels compiled ahead of time for an H100: no GPU is needed, only JAX's CUDA packages (make check-cuda).

ptxas says what each kernel takes. Run as a program, this file compiles the case that it is given.
"""

import functools
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh as DeviceMesh
from jax.sharding import NamedSharding, PartitionSpec

from lcx.ops.types import AttentionSpec, Mask, Runs, Segments
from lcx.planning.gpus import h100s
from pallas_kernels import attention_hopper
from tests.cuda.installed import needs_cuda

pytestmark = needs_cuda

ROOT = pathlib.Path(__file__).parent.parent.parent
LOCAL = Mask(window=(1000, 0), sink_tokens=4)
CASES = {
    "causal_64": dict(K=64),
    "causal_128": dict(K=128),
    "causal_256": dict(K=256),
    "full_128": dict(K=128, mask=Mask(causal=False)),
    "zigzag_ring_64": dict(K=64, runs=2, packed=True, carry=True),
    "zigzag_ring_128": dict(K=128, runs=2, packed=True, carry=True),
    "window_sinks_64": dict(K=64, mask=LOCAL, packed=True),
    "window_sinks_128": dict(K=128, mask=LOCAL, packed=True),
    "softcap_128": dict(K=128, softcap=30.0, packed=True),
    "alibi_128": dict(K=128, alibi=True),
    "float16_128": dict(K=128, dtype=jnp.float16),
    # More numbers than 32 bits count: in all rows, and in one.
    "three_rows_of_two_billion_numbers": dict(K=128, B=3, S=2**21),
    "a_row_of_four_billion_numbers": dict(K=128, S=2**22, runs=2, packed=True, carry=True),
}
# What spills all the same, in bytes stored: sums of 64 x 256 leave few registers for anything else.
SPILLS = {"causal_256": 32}


def compile_case(K, mask=Mask(), runs=1, packed=False, carry=False, softcap=None, alibi=False, dtype=jnp.bfloat16, B=1, S=4096):
    """Forward and backward in one program."""
    H, G = 8, 2
    mesh = DeviceMesh(np.array(h100s(1)), ("device",))
    array = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))
    q, k, lse = array((B, S, H, K), dtype), array((B, S, G, K), dtype), array((B, H, S), jnp.float32)
    tokens = dict(starts=array((runs,), jnp.int32))
    if packed:
        tokens["segments"] = array((B, S), jnp.int32)
    if mask.sink_tokens:
        tokens["sink"] = array((B, S), jnp.bool_)
    if alibi:
        tokens["slopes"] = array((H,), jnp.float32)
    carried = (array((B, S, H, K), jnp.float32), lse) if carry else None

    def both(q, k, v, do, lse, delta, tokens, carry):
        order = Runs(tokens["starts"], S // runs)
        segments = Segments(tokens.get("segments"), tokens.get("segments"), tokens.get("sink"))
        options = dict(spec=AttentionSpec(mask, K**-0.5, softcap), order_q=order, order_k=order, segments=segments)
        options |= dict(alibi_slopes_H=tokens.get("slopes"))
        forward = attention_hopper.forward(q, k, v, **options, carry=carry)
        return forward, attention_hopper.backward(q, k, v, do, lse, delta, **options)

    with jax.set_mesh(mesh):
        jax.jit(both).lower(q, k, k, q, lse, lse, tokens, carried).compile()


@functools.cache
def compiled(name: str, sizes: str = "") -> tuple[str, dict[str, tuple[int, int]]]:
    """What was printed, and by kernel (bytes of spill stores, registers). In its own process: ptxas prints past Python."""
    environment = os.environ | dict(JAX_PLATFORMS="cpu", MOSAIC_GPU_DUMP_PTXAS="1", XLA_FLAGS="")
    command = [sys.executable, "-m", "tests.cuda.test_attention_hopper_compiles", name, sizes]
    run = functools.partial(subprocess.run, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    done = run(command, env=environment, timeout=300)
    found, kernel = {}, None
    for line in done.stdout.splitlines():
        if match := re.search(r"Compiling entry function '(\w+?)_mosaic_gpu_kernel' for 'sm_90a'", line):
            kernel = match[1]
        elif match := re.search(r"^\s+\d+ bytes stack frame, (\d+) bytes spill stores", line):
            found[kernel] = (int(match[1]), 0)
        elif match := re.search(r"Used (\d+) registers", line):
            found[kernel] = (found[kernel][0], int(match[1]))
    return done.stdout + f"\nexit {done.returncode}", found


@pytest.mark.parametrize("name", CASES)
def test_compiles_without_spills(name):
    printed, found = compiled(name)
    assert printed.endswith("exit 0"), printed[-3000:]
    gradients = {"dk_dv"} if CASES[name]["K"] <= 128 else {"dk", "dv"}
    assert set(found) == {f"lcx_attention_{kernel}" for kernel in {"forward", "dq"} | gradients}, printed[-3000:]
    for kernel, (spilled, registers) in found.items():
        assert spilled <= SPILLS.get(name, 0), f"{kernel}: {spilled} bytes of spill stores"
        # Three warpgroups start with a third of the registers each; two with what a thread can address.
        assert registers <= (168 if CASES[name]["K"] <= 128 or kernel.endswith("forward") else 255), (kernel, registers)


def test_tiles_too_large_for_the_registers_are_noticed():
    _, found = compiled("causal_128", "dkv 2 128")
    assert found["lcx_attention_dk_dv"][0] > 0


def test_tiles_too_large_for_shared_memory_do_not_compile():
    printed, _ = compiled("causal_256", "forward 2 128")
    assert "exit 1" in printed and "shared memory" in printed.lower(), printed[-3000:]


if __name__ == "__main__":
    case, changed = sys.argv[1:]
    if changed:
        changed_kernel, *numbers = changed.split()
        of = attention_hopper.sizes
        changed_sizes = attention_hopper.Sizes(*map(int, numbers))
        attention_hopper.sizes = lambda kernel, K: changed_sizes if kernel == changed_kernel else of(kernel, K)
    compile_case(**CASES[case])
