"""H100s that are not here: XLA's CUDA compiler takes them from a description, so JAX's CUDA packages are all that it needs."""

import jax
from jax.experimental import topologies

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
    """GPUs of one host, to compile for; nothing can run on them."""
    shape = f"1x1x{count}"
    return topologies.get_topology_desc(platform="cuda", topology_name=shape, topology=shape, target_config=H100).devices
