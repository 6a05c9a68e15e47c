"""Checkpoints: asynchronous Orbax saves with checksums, and a restore that falls back to the newest undamaged step."""

import contextlib
import dataclasses
import logging
import pathlib
import shutil
import time
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from lcx.folders import make_folder
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
    "init_from",
    "sequence.layout",
    "block.",
    "loss.chunk",
    "data.cache_dir",
    "train.accumulate",
    "train.log_every",
    "train.max_bad_steps",
    "evaluate.",
    "checkpoint.",
    "track.",
)
# Of layers: which implementation, in which chunks, over which groups of devices.
FREE_ENDINGS = (".implementation", ".chunk", ".ulysses_degree")


@dataclasses.dataclass(frozen=True)
class Found:
    """A checkpoint to continue from.

    Attributes:
      step: its step.
      loader: state of the data iterator.
      rejected: one line for every newer checkpoint that was damaged.
    """

    step: int
    loader: dict[str, Any]
    rejected: tuple[str, ...]


def differences(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """The fields in which two identities (`identity`) describe different trainings: `field: saved -> current`.

    A field that did not exist when the checkpoint was written had the value that is its default now.
    """
    named = lambda field: any(field.startswith(f) if f.endswith(".") else field == f for f in FREE_FIELDS)
    free = lambda field: named(field) or field.endswith(FREE_ENDINGS)
    values, defaults = current["values"], current["defaults"]
    then = lambda field: saved["values"].get(field, defaults.get(field, "absent"))
    now = lambda field: values[field] if field in values else "absent"
    changed = [f for f in sorted(saved["values"].keys() | values.keys()) if not free(f) and then(f) != now(f)]
    # Another part has other fields: that it is another says it all.
    replaced = {"pattern": "layers.", "data.source": "dataset."}
    others = tuple(replaced.get(f, f"{f}.") for f in changed)
    return [f"{f}: {then(f)!r} -> {now(f)!r}" for f in changed if not f.startswith(others)]


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: where they lie.
      config: how many to keep.
      identity: what the run computes (`identity`), saved beside each state and compared on restore; None compares nothing, for
        those who only read parameters.
    """

    def __init__(self, directory: pathlib.Path, config: CheckpointConfig, identity: dict[str, Any] | None):
        self._directory = directory.resolve()
        self._identity = identity
        make_folder(self._directory, "checkpoints of --workdir")
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
        meta = {"format_version": FORMAT_VERSION, "step": step, "loader": loader, "identity": self._identity}
        self._manager.save(
            step, args=ocp.args.Composite(state=ocp.args.StandardSave(_as_tree(state)), meta=ocp.args.JsonSave(meta))
        )

    def find(self) -> Found | None:
        """The newest undamaged checkpoint, or None when there is none at all; every file of it has been read.

        Raises:
          UserError: the checkpoint belongs to another config or format, or every checkpoint is damaged.
        """
        step, rejected = self._newest_good()
        if step is None:
            if rejected:
                raise UserError(f"every checkpoint is damaged; move {self._directory} away to start anew. Newest: {rejected[0]}")
            return None
        meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        self._compare(step, meta)
        return Found(step, meta["loader"], tuple(rejected))

    def restore(self, step: int, wanted: TrainState) -> TrainState:
        """The state of a checkpoint that `find` found; newer ones, which are damaged, are moved to checkpoints-damaged.

        Args:
          step: its step.
          wanted: ShapeDtypeStructs of the state, with the shardings its leaves get.
        """
        tree = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(_as_tree(wanted)))).state
        self._discard_after(step)
        return TrainState(**tree)

    def restore_params(self, step: int, wanted: Any) -> Any:
        """The parameters alone of a checkpoint that `find` found.

        Args:
          step: its step.
          wanted: ShapeDtypeStructs of the parameters, with the shardings they get.

        Raises:
          UserError: the checkpoint's parameters have other names or shapes.
        """
        with contextlib.closing(ocp.PyTreeCheckpointHandler()) as reader:
            saved = _shapes(reader.metadata(self._directory / str(step) / "state").tree["params"])
        asked = _shapes(wanted)
        changed = [name for name in sorted(saved.keys() | asked.keys()) if saved.get(name) != asked.get(name)]
        if changed:
            first = "; ".join(f"{name}: {saved.get(name, 'absent')} -> {asked.get(name, 'absent')}" for name in changed[:2])
            more = f" and {len(changed) - 2} more" if len(changed) > 2 else ""
            raise UserError(f"the parameters in {self._directory} have other shapes than the config's: {first}{more}")
        tree = {"params": wanted}
        args = ocp.args.PyTreeRestore(
            item=tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree), partial_restore=True
        )
        return self._manager.restore(step, args=ocp.args.Composite(state=args)).state["params"]

    def _newest_good(self) -> tuple[int | None, list[str]]:
        """The newest step whose files are as they were written, and a line for every newer one. Process 0 reads the files and
        decides for all: each reading all of a pod's checkpoint would take long, and they must not differ."""
        steps, rejected, chosen = sorted(self._manager.all_steps(), reverse=True), [], -1
        for step in steps if jax.process_index() == 0 else ():
            reason = manifest.damage(self._directory / str(step))
            if not reason:
                chosen = step
                break
            rejected.append(reason)
        if jax.process_count() > 1:
            chosen = int(multihost_utils.broadcast_one_to_all(np.int32(chosen)))
        if chosen < 0 and steps and not rejected:
            rejected = [f"process 0 found step {steps[0]} damaged"]
        return (chosen if chosen >= 0 else None), rejected

    def _compare(self, step: int, meta: dict[str, Any]) -> None:
        if meta["format_version"] != FORMAT_VERSION:
            raise UserError(f"checkpoint step {step} has format {meta['format_version']}, this lcx reads {FORMAT_VERSION}")
        changed = differences(meta["identity"], self._identity) if self._identity else []
        if changed:
            raise UserError(
                f"the checkpoint in {self._directory} was trained with another config ({'; '.join(changed)}); "
                "restore the value or choose another --workdir"
            )

    def _discard_after(self, step: int) -> None:
        """Moves damaged newer steps aside, whose numbers this run will need: what cannot be read today may be tomorrow."""
        for newer in [s for s in self._manager.all_steps() if s > step]:
            if jax.process_index() == 0:
                aside = self._directory.with_name(f"{self._directory.name}-damaged") / f"{newer}-{time.time_ns()}"
                aside.parent.mkdir(exist_ok=True)
                shutil.move(self._directory / str(newer), aside)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints are gone")
        self._manager.reload()

    def close(self) -> None:
        """Waits for the last save."""
        with contextlib.closing(self._manager):
            self._manager.wait_until_finished()


def _shapes(params: Any) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter; the same for a state and for Orbax's description of a saved one."""
    return {
        ".".join(str(key.key) for key in path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def _as_tree(state: TrainState) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
