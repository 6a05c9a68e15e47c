"""Both recurrences over slices of TPUs, states passed on: memory, kernels and messages of what is compiled, not run."""

import collections
import importlib.util
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from lcx.parallel import recurrences
from lcx.planning.memory import compiled_bytes
from lcx.planning.schedule import KERNEL, transfers
from lcx.planning.topologies import topology_mesh
from lcx.sharding import activation_spec

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="NOT CHECKED: compiling for TPUs needs pip install 'lcx[plan]' (libtpu)"
)
pytestmark = [pytest.mark.slow, needs_libtpu]
# Target -> (tokens, E). Over four devices a summary of E=2048 is small enough to be gathered.
CASES = {"v5p:2x2x1": (2**20, 2048), "v5p:4x4x4": (2**24, 4096)}
N_SCAN, K, N_SSD = 16, 64, 128
# What else a device holds: B and C turned, and states on their way.
SLACK = 1.08


def compiled(op: str, target: str):
    """Both passes of packed rows in bf16, with everything that a mixer gives; tokens B S E, as a mixer has them."""
    mesh, (S, E) = topology_mesh(target, seq=-1), CASES[target]

    def shape(dims, dtype=jnp.bfloat16, **sizes):
        sizes = dict(B=1, S=S, E=E, N=N_SCAN, H=E // K) | sizes
        return jax.ShapeDtypeStruct([sizes[dim] for dim in dims], dtype, sharding=NamedSharding(mesh, activation_spec(dims)))

    by_token, whole = shape("BSE"), lambda dims: shape(dims, jnp.float32)
    options = dict(mesh=mesh, implementation="mosaic_tpu")
    if op == "selective_scan":
        arrays = [by_token, by_token, whole("EN"), shape("BSN"), shape("BSN"), whole("E"), by_token, whole("E")]

        def run(segments, u, dt, A, B, C, D, z, bias):
            return recurrences.selective_scan(u, dt, A, B, C, D, z_BSE=z, dt_bias_E=bias, segments_BS=segments, **options)
    else:
        maps = shape("BSN", N=N_SSD)
        arrays = [by_token, shape("BSH"), whole("H"), maps, maps, whole("H"), whole("H")]

        def run(segments, x, dt, A, B, C, D, bias):
            x_BSHK, one_group = x.reshape(1, S, E // K, K), lambda x: x[:, :, None]
            given = x_BSHK, dt, A, one_group(B), one_group(C), D
            return recurrences.ssd(*given, dt_bias_H=bias, segments_BS=segments, **options).reshape(1, S, E)

    def both(segments, dy, *arrays):
        y, pull = jax.vjp(lambda *arrays: run(segments, *arrays), *arrays)
        return y, pull(dy)

    with jax.set_mesh(mesh), jax.default_matmul_precision("default"):
        return jax.jit(both).lower(shape("BS", jnp.int32), by_token, *arrays).compile(), mesh.size


def unavoidable(op: str, tokens: int, E: int) -> int:
    """Bytes of a device: states that are kept for the backward pass, parts of dB and dC that are added up, and dt as rows."""
    if op == "selective_scan":  # two cores, each of which has half of the channels
        return tokens * 4 * (E * N_SCAN // 128 + 2 * 2 * N_SCAN)
    programs, H = E // 1024, E // K
    return tokens * 4 * (E * N_SSD // 512 + 2 * programs * N_SSD + 2 * H)


@pytest.mark.parametrize("target", CASES)
@pytest.mark.parametrize("op", ["selective_scan", "ssd"])
def test_states_are_passed_on_in_little_memory(op, target, capsys):
    program, P = compiled(op, target)
    S, E = CASES[target]
    temporary, needed, text = compiled_bytes(program)["temporary"], unavoidable(op, S // P, E), program.as_text()
    with capsys.disabled():
        print(f"\n{op}, {S:,} tokens on {target}: {temporary / 2**20:.0f} MiB a device, {needed / 2**20:.0f} known", end="")
    assert needed <= temporary <= SLACK * needed

    kernels = [re.search(r"%(\w+)", line)[1] for line in text.splitlines() if KERNEL.search(line)]
    assert sorted(kernels) == [f"lcx_{op}{which}" for which in ("", "_backward", "_reverse_summary", "_summary")]

    message = 4 * (E * N_SCAN + E if op == "selective_scan" else E * N_SSD + E // K)
    found = collections.Counter((t.kind, t.sent) for t in transfers(text) if t.kind != "all-reduce")
    segments = {("collective-permute", 4): 1}
    if P * message <= 2**20:
        assert found == {("all-gather", (P - 1) * message): 2} | segments
    else:  # the neighbour's summary, then those of 1, 2, 4, ... devices before it; forward and backward
        assert found == {("collective-permute", message): 2 * (1 + math.ceil(math.log2(P - 1)))} | segments
    # Gradients of A, D and the bias, once.
    assert [t.times for t in transfers(text) if t.kind == "all-reduce"] == [1]
