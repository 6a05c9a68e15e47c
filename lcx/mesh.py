"""The device mesh: axes data, fsdp, seq, tensor, and the only place that starts `jax.distributed`."""

import dataclasses
import math
import os
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from lcx.registry import UserError

AXES = ("data", "fsdp", "seq", "tensor")
BATCH_AXES = ("data", "fsdp")


@dataclasses.dataclass(frozen=True)
class Config:
    """Devices along each axis; one of them may be -1 for what is left.

    Attributes:
      data: copies of the parameters, each with its share of the batch.
      fsdp: shares of the batch over which parameters are spread.
      seq: shares of each sequence; parameters are spread over these as well.
      tensor: shares of heads, feed-forward width and vocabulary.
    """

    data: int = 1
    fsdp: int = 1
    seq: int = -1
    tensor: int = 1


def resolve_sizes(sizes: dict[str, int], device_count: int) -> dict[str, int]:
    """Replaces the one axis size that may be -1 by what is left, and checks that the product is the device count.

    Raises:
      UserError: more than one -1, a size below 1, or a product that is not `device_count`.
    """
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            raise UserError(f"mesh.{axis}={size} must be at least 1, or -1 for the devices that are left")
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    drawn = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
    if len(free) > 1:
        raise UserError(f"mesh.{free[1]}=-1: only one axis may be -1 ({drawn})")
    if free:
        if device_count % fixed:
            raise UserError(
                f"mesh {drawn}: {device_count} devices cannot be divided by {fixed}; change mesh.{free[0]} or another axis"
            )
        return {axis: device_count // fixed if size == -1 else size for axis, size in sizes.items()}
    if fixed != device_count:
        raise UserError(
            f"mesh {drawn} needs {fixed} devices and there are {device_count}; set one axis to -1 to use what is there"
        )
    return dict(sizes)


def make_mesh(data: int = 1, fsdp: int = 1, seq: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of `AxisType.Auto` axes (data, fsdp, seq, tensor).

    Args:
      data, fsdp, seq, tensor: axis sizes; one of them may be -1.
      devices: devices in ring order along `seq`; None takes the first ones of `jax.devices()`.

    Raises:
      UserError: the sizes do not fit the devices.
    """
    sizes = dict(data=data, fsdp=fsdp, seq=seq, tensor=tensor)
    if devices is None:
        available = jax.devices()
        wanted = len(available) if -1 in sizes.values() else math.prod(sizes.values())
        if wanted > len(available):
            raise UserError(f"mesh {sizes} needs {wanted} devices and there are {len(available)}")
        devices = available[:wanted]
    sizes = resolve_sizes(sizes, len(devices))
    grid = np.asarray(devices, dtype=object).reshape([sizes[axis] for axis in AXES])
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def initialize_distributed() -> None:
    """Joins the processes of a multi-host run where a launcher announces one; does nothing on a single host.

    JAX recognises SLURM, Kubernetes, Open MPI and Cloud TPU by itself; `LCX_COORDINATOR`, `LCX_PROCESSES` and
    `LCX_PROCESS_ID` state a run by hand (the local launcher sets them).
    """
    if "LCX_COORDINATOR" in os.environ:
        if jax.config.jax_platforms == "cpu" or os.environ.get("JAX_PLATFORMS") == "cpu":
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            coordinator_address=os.environ["LCX_COORDINATOR"],
            num_processes=int(os.environ["LCX_PROCESSES"]),
            process_id=int(os.environ["LCX_PROCESS_ID"]),
        )
    elif (
        int(os.environ.get("SLURM_NTASKS", "1")) > 1
        or "OMPI_COMM_WORLD_SIZE" in os.environ
        or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    ):
        jax.distributed.initialize()
