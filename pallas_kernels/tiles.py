"""Tile sizes of the attention kernels: what was measured on a device where somebody has, else a heuristic.

`python -m lcx.bench tune` measures, and writes `tuned/<device kind>.json`.
"""

import contextlib
import contextvars
import functools
import json
import pathlib
import re
from collections.abc import Iterator, Mapping

import jax

TUNED = pathlib.Path(__file__).parent / "tuned"

Sizes = tuple[int, int]

# Kernel -> (tokens of a program's own tile, tokens of a tile that is streamed past it).
HEURISTICS: dict[str, Sizes] = {
    # Both kernels: queries, keys. An fp32 product is six bf16 ones, so that a quarter of a tile is work enough.
    "tpu_bfloat16": (512, 512),
    "tpu_float32": (256, 256),
    # What fits 227 KiB of shared memory and the registers of a warpgroup, without spills (tests/cuda). By head width.
    "hopper_forward_64": (128, 128),
    "hopper_forward_128": (128, 128),
    "hopper_forward_256": (128, 64),
    "hopper_dq_64": (128, 128),
    "hopper_dq_128": (128, 64),
    "hopper_dq_256": (64, 64),
    "hopper_dkv_64": (128, 64),
    "hopper_dkv_128": (128, 64),
    "hopper_dkv_256": (64, 64),
}
# What tuning tries, by the first word of a kernel's name. What does not fit a device does not compile there.
CANDIDATES: dict[str, tuple[Sizes, ...]] = {
    "tpu": tuple((q, k) for q in (256, 512, 1024) for k in (256, 512, 1024, 2048)),
    "hopper": tuple((own, across) for own in (64, 128) for across in (64, 128, 256)),
}

_TRIED: contextvars.ContextVar[Mapping[str, Sizes] | None] = contextvars.ContextVar("lcx_tiles_tried", default=None)


def tile_sizes(kernel: str) -> Sizes:
    """The tiles of a kernel of `HEURISTICS` on the device that is traced for, in tokens: (its own, the streamed one)."""
    measured = tuned(TUNED / f"{slug(device_kind())}.json")
    return {**HEURISTICS, **measured, **(_TRIED.get() or {})}[kernel]


@contextlib.contextmanager
def trying(sizes: Mapping[str, Sizes]) -> Iterator[None]:
    """Kernels traced inside the block take these sizes, by kernel."""
    token = _TRIED.set(sizes)
    try:
        yield
    finally:
        _TRIED.reset(token)


@functools.cache
def tuned(path: pathlib.Path) -> dict[str, Sizes]:
    """Kernel -> sizes from a file that tuning wrote; empty where there is none."""
    if not path.is_file():
        return {}
    return {kernel: (own, across) for kernel, (own, across) in json.loads(path.read_text())["tiles"].items()}


def slug(device_kind: str) -> str:
    """A device kind as a file name: "NVIDIA H200" is nvidia_h200."""
    return re.sub(r"[^a-z0-9]+", "_", device_kind.lower()).strip("_")


def device_kind() -> str:
    """Of the device that is traced for: the mesh's in force, else the default backend's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (jax.devices()[0] if device is None else device).device_kind
