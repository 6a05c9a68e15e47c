"""Checkpoints: asynchronous Orbax saves with checksums, and a restore that falls back to the newest undamaged step."""

import contextlib
import dataclasses
import logging
import pathlib
import shutil
from typing import Any

import jax
import orbax.checkpoint as ocp

from lcx.registry import UserError
from lcx.train_loop import manifest
from lcx.train_loop.settings import CheckpointConfig
from lcx.train_loop.state import TrainState

FORMAT_VERSION = 1

# Fields that may differ between a checkpoint and the run that continues it: they change where and how fast a run computes,
# what it reports and how long it keeps things, never what it computes.
FREE_FIELDS = (
    "name",
    "scale",
    "require.",
    "mesh.",
    "sequence.layout",
    "block.",
    "loss.chunk",
    "data.cache_dir",
    "train.log_every",
    "train.max_bad_steps",
    "evaluate.",
    "checkpoint.",
    "track.",
)


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint gives back.

    Attributes:
      state: the training state, placed on the mesh of this run.
      step: its step.
      loader: state of the data iterator.
      rejected: one line for every newer checkpoint that was damaged.
    """

    state: TrainState
    step: int
    loader: dict[str, Any]
    rejected: tuple[str, ...]


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    found = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def differences(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """The fields in which two resolved configs describe different trainings, as `field: saved value -> current value`."""
    saved, current = flat(saved), flat(current)
    free = lambda field: (
        field.endswith(".implementation") or any(field.startswith(f) if f.endswith(".") else field == f for f in FREE_FIELDS)
    )
    changed = [f for f in sorted(saved.keys() | current.keys()) if not free(f) and saved.get(f, None) != current.get(f, None)]
    return [f"{f}: {saved.get(f, 'absent')!r} -> {current.get(f, 'absent')!r}" for f in changed]


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: where they lie.
      config: how many to keep.
      resolved: the run's resolved config, saved beside each state and compared on restore.
    """

    def __init__(self, directory: pathlib.Path, config: CheckpointConfig, resolved: dict[str, Any]):
        self._directory = directory.resolve()
        self._resolved = resolved
        directory.mkdir(parents=True, exist_ok=True)
        logging.getLogger("absl").setLevel(logging.WARNING)
        self._manager = ocp.CheckpointManager(
            self._directory,
            item_names=("state", "meta"),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=config.keep,
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._write_manifest),
            ),
        )

    def _write_manifest(self) -> None:
        """Runs in the saving thread after the last byte is written and before the rename that commits the step."""
        if jax.process_index() == 0:
            for unfinished in self._directory.glob("*.orbax-checkpoint-tmp*"):
                manifest.write(unfinished)

    def save(self, step: int, state: TrainState, loader: dict[str, Any]) -> None:
        """Starts saving; returns once the state has been copied off the devices."""
        if step in self._manager.all_steps():
            return
        meta = {"format_version": FORMAT_VERSION, "step": step, "loader": loader, "config": self._resolved}
        self._manager.save(
            step, args=ocp.args.Composite(state=ocp.args.StandardSave(_as_tree(state)), meta=ocp.args.JsonSave(meta))
        )

    def restore(self, shapes: TrainState, shardings: TrainState) -> Restored | None:
        """The newest undamaged checkpoint, or None when there is none at all.

        Args:
          shapes: ShapeDtypeStructs of the state.
          shardings: where its leaves go.

        Raises:
          UserError: the checkpoint belongs to another config or format, or every checkpoint is damaged.
        """
        rejected = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            reason = manifest.damage(self._directory / str(step))
            if reason:
                rejected.append(reason)
                continue
            meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
            self._compare(step, meta)
            place = lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
            wanted = _as_tree(jax.tree.map(place, shapes, shardings))
            tree = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(wanted))).state
            self._discard_after(step)
            return Restored(TrainState(**tree), step, meta["loader"], tuple(rejected))
        if rejected:
            raise UserError(f"every checkpoint is damaged; move {self._directory} away to start anew. Newest: {rejected[0]}")
        return None

    def _compare(self, step: int, meta: dict[str, Any]) -> None:
        if meta["format_version"] != FORMAT_VERSION:
            raise UserError(f"checkpoint step {step} has format {meta['format_version']}, this lcx reads {FORMAT_VERSION}")
        changed = differences(meta["config"], self._resolved)
        if changed:
            raise UserError(
                f"the checkpoint in {self._directory} was trained with another config ({'; '.join(changed)}); "
                "restore the value or choose another --workdir"
            )

    def _discard_after(self, step: int) -> None:
        """Removes damaged newer steps, whose numbers the continued run will need."""
        for newer in [s for s in self._manager.all_steps() if s > step]:
            if jax.process_index() == 0:
                shutil.rmtree(self._directory / str(newer), ignore_errors=True)
        self._manager.reload()

    def close(self) -> None:
        """Waits for the last save."""
        with contextlib.closing(self._manager):
            self._manager.wait_until_finished()


def _as_tree(state: TrainState) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
