"""One process owns 32 virtual CPU devices and every test's mesh takes a subset; strict everywhere."""

import os
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in os.environ["XLA_FLAGS"]:
    os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=32 --xla_cpu_collective_call_terminate_timeout_seconds=600"

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
# Runs that differ only in their workdir, and the workers of one session, share their compiled programs.
jax.config.update("jax_compilation_cache_dir", os.path.join(tempfile.gettempdir(), f"lcx-test-compilations-{jax.__version__}"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(scope="session")
def mesh_of():
    """mesh_of(seq=4, data=2) -> a mesh over the first devices."""
    from lcx.mesh import make_mesh

    return make_mesh
