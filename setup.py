"""Package metadata of lcx. Install with `make train` or `pip install -e '.[test]' -c constraints.txt`."""

import sys

if sys.version_info < (3, 12):
    # Python 3.11 would resolve, without a word, to a stack two releases older than the one lcx is tested with.
    sys.exit(f"error: lcx needs Python >= 3.12, this is {sys.version.split()[0]}; choose one with `make PYTHON=python3.12 ...`")

from setuptools import find_packages, setup

REQUIRED = [
    "jax>=0.11.2",
    "flax>=0.12.12",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "jax-triton>=0.4.1",
    "ml-collections>=1.1.0",
    "tensorflow-datasets>=4.9.10",
    "importlib_resources",  # tensorflow-datasets imports it and does not declare it
    "wandb>=0.31.0",
    "grain>=0.2.18",
    "array-record",
    "rich",
    "safetensors",
    "xxhash",
]

EXTRAS = {
    "cuda": ["jax[cuda13]>=0.11.2"],
    "tpu": ["jax[tpu]>=0.11.2"],
    "plan": ["libtpu"],
    "plots": ["matplotlib"],
    "hf": ["datasets"],
    "tokenizers": ["tokenizers", "sentencepiece"],
    "tensorboard": ["tensorboardX"],
    "tokamax": ["tokamax>=0.0.17"],  # attention to measure against
    "test": [
        'libtpu; sys_platform == "linux" and platform_machine == "x86_64"',  # every kernel is compiled for every TPU
        "pytest",
        "pytest-xdist",
        "hypothesis",
        "jaxtyping",
        "matplotlib",
        "tokenizers",
        "sentencepiece",
        "tensorboardX",
        "ruff",
    ],
}

setup(
    name="lcx",
    version="0.1.0",
    description="Training on very long sequences, from 128 thousand tokens to a billion, in JAX and Flax",
    python_requires=">=3.12",
    packages=find_packages(include=["lcx", "lcx.*", "pallas_kernels", "pallas_kernels.*", "configs", "launch", "launch.*"]),
    package_data={"pallas_kernels": ["tuned/*.json"]},
    install_requires=REQUIRED,
    extras_require=EXTRAS,
)
