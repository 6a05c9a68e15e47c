"""The device mesh: axes data, fsdp, seq, tensor, and the only place that starts `jax.distributed`."""

import dataclasses
import math
import os
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh

from lcx.placement import ring_order
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
      devices: which to use; None takes the first ones of `jax.devices()`. They are put in order by `lcx.placement`.

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
    if len(devices) > 1 and devices[0].platform == "cpu":
        _compile_anew()
    grid = np.asarray(ring_order(devices, sizes["seq"], sizes["tensor"]), dtype=object).reshape([sizes[axis] for axis in AXES])
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _compile_anew() -> None:
    """Takes JAX's compilation cache out of use.

    XLA reads a program for CPUs back without the order between the collectives in its loops and those outside of them (jax
    0.11.2): devices then take one another's messages or wait for each other for ever. Accelerators are not concerned.
    """
    if jax.config.jax_enable_compilation_cache:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()


def initialize_distributed() -> None:
    """Joins the processes of a run where a launcher announces several; does nothing on a single host.

    JAX recognises Open MPI, SLURM (srun), Cloud TPU and Kubernetes (an indexed Job) by itself; `LCX_COORDINATOR`,
    `LCX_PROCESSES` and `LCX_PROCESS_ID` state a run by hand.

    Raises:
      UserError: a run by hand that is not stated in full.
    """
    if "LCX_COORDINATOR" in os.environ:
        if jax.config.jax_platforms == "cpu" or os.environ.get("JAX_PLATFORMS") == "cpu":
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
        if not os.environ["LCX_COORDINATOR"].rpartition(":")[2].isdecimal():
            raise UserError(f"LCX_COORDINATOR={os.environ['LCX_COORDINATOR']!r} must be HOST:PORT")
        processes = _stated("LCX_PROCESSES", 1)
        jax.distributed.initialize(
            coordinator_address=os.environ["LCX_COORDINATOR"],
            num_processes=processes,
            process_id=_stated("LCX_PROCESS_ID", 0, processes - 1),
        )
    elif _is_announced():
        jax.distributed.initialize()


def _stated(name: str, low: int, high: int | None = None) -> int:
    """An integer from the environment."""
    text = os.environ.get(name, "")
    if not text.isdecimal() or int(text) < low or (high is not None and int(text) > high):
        limits = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise UserError(f"LCX_COORDINATOR is set, so {name}={text!r} must be an integer {limits}")
    return int(text)


def _is_announced() -> bool:
    """Whether this process belongs to a run that `jax.distributed.initialize()` can join without arguments.

    A host of a Cloud TPU joins even when it is the only one: its notice of preemption arrives that way.
    """
    # Private, and all there is: initialize() walks the same list and raises where no environment is present. The tests of
    # lcx.mesh set up every environment and fail when a new JAX detects it in another way.
    from jax._src.clusters import ClusterEnv, K8sCluster, SlurmCluster
    from jax._src.clusters.cloud_tpu_cluster import BaseTpuCluster

    # Asked first, because JAX looks for its job with the Kubernetes API, and a pod outside an indexed Job has none.
    pod_alone = "JOB_COMPLETION_INDEX" not in os.environ
    known = (env for env in ClusterEnv._cluster_types if not (env.opt_in_only_method or (env is K8sCluster and pod_alone)))
    env = next((env for env in known if env.is_env_present()), None)
    if env is None or issubclass(env, BaseTpuCluster):
        return env is not None
    if env is SlurmCluster and "SLURM_STEP_NUM_TASKS" in os.environ:
        # A shell of salloc or sbatch is one task, also where SLURM_NTASKS tells how many srun would start.
        return int(os.environ["SLURM_STEP_NUM_TASKS"]) > 1
    return env.get_process_count() > 1
