"""What a run leaves behind about itself: config.json and run.json before step 0, summary.json at the end."""

import importlib.metadata
import json
import math
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any

import jax
from jax.sharding import Mesh

from lcx.experiment import Experiment
from lcx.train_loop.state import ModelPlan

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "jax-triton", "numpy", "libtpu")


def strict(value: Any) -> Any:
    """The value with every number that JSON cannot write (NaN, infinities) as None."""
    if isinstance(value, dict):
        return {name: strict(x) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes JSON beside the file and renames it, so that a reader never sees half of it."""
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(strict(value), indent=2, sort_keys=True, default=str, allow_nan=False) + "\n")
    os.replace(beside, path)


def read_json(path: pathlib.Path) -> Any:
    """What the file holds; None when there is none, or what is there is no JSON (it was cut short)."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def versions() -> dict[str, str]:
    """Installed versions of what computes."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str:
    """The commit of the checkout lcx runs from, with +changes when it has uncommitted ones; "unknown" outside git."""
    here = pathlib.Path(__file__).parent
    git = lambda *args: subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def mesh_rows(mesh: Mesh) -> list[str]:
    """The mesh as text: a row per (data, fsdp, tensor) coordinate, the ring of `seq` devices along it."""
    rows = []
    for d in range(mesh.shape["data"]):
        for f in range(mesh.shape["fsdp"]):
            for t in range(mesh.shape["tensor"]):
                ring = " > ".join(str(device.id) for device in mesh.devices[d, f, :, t])
                rows.append(f"data {d}  fsdp {f}  tensor {t} | seq: {ring}")
    return rows


def parameter_table(plan: ModelPlan) -> dict[str, int]:
    """Parameters by the part of the model that holds them, and in all."""
    counts: dict[str, int] = {}
    for path, shape in jax.tree_util.tree_leaves_with_path(plan.shapes):
        name = ".".join(str(key.key) for key in path if not isinstance(key.key, int))
        counts[name] = counts.get(name, 0) + shape.size
    return counts | {"total": plan.parameter_count}


def run_record(
    experiment: Experiment, plan: ModelPlan, mesh: Mesh, implementations: Any, memory: dict[str, int]
) -> dict[str, Any]:
    """The content of run.json.

    Args:
      implementations: what the dispatcher recorded while the step was traced: winners and refusals per op.
      memory: bytes of the compiled step.
    """
    device = mesh.devices.flat[0]
    return {
        "name": experiment.run.name,
        "command": [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]],
        "scale": experiment.scale,
        "sequence_length": experiment.sequence.length,
        "full_sequence_length": experiment.full_length,
        "layout": experiment.layout,
        "remat": experiment.block.remat,
        "pattern": [kind.name for kind in experiment.pattern],
        "versions": versions(),
        "git_commit": git_commit(),
        "host": {"platform": platform.platform(), "processes": jax.process_count()},
        "device": {"kind": device.device_kind, "platform": device.platform, "count": mesh.size},
        "mesh": {"sizes": dict(mesh.shape), "devices": mesh_rows(mesh)},
        "parameters": parameter_table(plan),
        "implementations": implementations,
        "compiled_step_bytes": memory,
        "config": experiment.resolved,
    }
