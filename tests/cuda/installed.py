"""Whether what compiles for GPUs is installed: JAX's CUDA packages, no GPU."""

import importlib.util

import pytest

needs_cuda = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="NOT CHECKED: JAX's CUDA compiler is not installed here (make check-cuda installs it)",
)
