"""H100s to compile for: no GPU is needed, only JAX's CUDA packages."""

import importlib.util

import jax
import pytest
from jax.experimental import topologies

needs_cuda = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="NOT CHECKED: JAX's CUDA compiler is not installed here (make check-cuda installs it)",
)
# A Hopper SM, as XLA's CUDA compiler wants it described.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132 fpus_per_core: 128 threads_per_warp: 32 threads_per_core_limit: 2048 threads_per_block_limit: 1024
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_core: 233472 shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  clock_rate_ghz: 1.98 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84978434048
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def h100s(count: int) -> list[jax.Device]:
    """GPUs of one host."""
    shape = f"1x1x{count}"
    return topologies.get_topology_desc(platform="cuda", topology_name=shape, topology=shape, target_config=H100).devices
