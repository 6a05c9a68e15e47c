"""One process owns 32 virtual CPU devices and every test's mesh takes a subset; strict everywhere."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it once; to compile its kernels is for `make check-cuda`
FLAGS = (
    "--xla_force_host_platform_device_count=32",
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    # Compiling is most of the suite's time; unoptimised code takes a third of it and computes the same.
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
)
given = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join([given, *(flag for flag in FLAGS if flag.partition("=")[0] not in given)])

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
# Programs read back from a cache are not those that were compiled (lcx/mesh.py), and those for a TPU that is not here cannot be.
jax.config.update("jax_enable_compilation_cache", False)

pytest_plugins = ("tests.command_line", "tests.runs")


@pytest.fixture(scope="session")
def mesh_of():
    """mesh_of(seq=4, data=2) -> a mesh over the first devices."""
    from lcx.mesh import make_mesh

    return make_mesh
