"""Where metrics go. metrics.jsonl always; W&B and TensorBoard beside it. A tracker never ends a run."""

import itertools
import json
import logging
import netrc
import os
import pathlib
import secrets
from collections.abc import Callable
from typing import Any, Protocol

from lcx.train_loop.record import strict
from lcx.train_loop.settings import TrackConfig

logger = logging.getLogger("lcx")


class Tracker(Protocol):
    """Receives the metrics of a step."""

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Takes plain numbers."""

    def close(self) -> None:
        """The run is over."""


class Jsonl:
    """One JSON object per logged step, flushed at once. Lines of steps that a continued run will do again are dropped; a run that
    starts anew in a used workdir leaves the old file beside its own, as metrics-1.jsonl and so on."""

    def __init__(self, path: pathlib.Path, resumed_at: int):
        kept = []
        if not resumed_at and path.exists() and path.stat().st_size:
            taken = (path.with_stem(f"{path.stem}-{n}") for n in itertools.count(1))
            path.rename(next(other for other in taken if not other.exists()))
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= resumed_at:
                        kept.append(line)
                except (ValueError, KeyError, TypeError):
                    break  # a line cut short by a kill is the last one
        beside = path.with_suffix(".tmp")
        beside.write_text("".join(line + "\n" for line in kept))
        os.replace(beside, path)
        self._file = path.open("a")

    def log(self, step, metrics):
        """Appends a line; JSON has no NaN, so a figure that is not finite becomes null."""
        self._file.write(json.dumps(strict({"step": step} | metrics), allow_nan=False) + "\n")
        self._file.flush()

    def close(self):
        """Closes the file."""
        self._file.close()


class Wandb:
    """Weights & Biases. Online only with a key; otherwise offline files in the workdir."""

    def __init__(self, config: TrackConfig, workdir: pathlib.Path, name: str, resolved: dict[str, Any]):
        import wandb

        mode = config.wandb
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
        id_file = workdir / "wandb_id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        settings = wandb.Settings(console="off", silent=True)
        options = dict(project=config.project, name=name, id=id_file.read_text(), resume="allow", dir=workdir, config=resolved)
        try:
            self._run = wandb.init(mode=mode, settings=settings, **options)
        except Exception as error:  # noqa: BLE001  whatever it is, it must not end a run
            if mode == "offline":
                raise
            logger.warning("W&B cannot go online (%s); logging offline under %s", _first_line(error), workdir / "wandb")
            self._run = wandb.init(mode="offline", settings=settings, **options)

    def log(self, step, metrics):
        """Sends a step."""
        self._run.log(metrics, step=step)

    def close(self):
        """Ends the W&B run."""
        self._run.finish()


class TensorBoard:
    """TensorBoard event files."""

    def __init__(self, directory: pathlib.Path):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(directory))

    def log(self, step, metrics):
        """Writes scalars."""
        for name, value in metrics.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, step)

    def close(self):
        """Flushes."""
        self._writer.close()


class Guarded:
    """A tracker whose failures are reported once and then ignored."""

    def __init__(self, name: str, tracker: Tracker):
        self._name, self._tracker, self._failed = name, tracker, False

    def _try(self, call, *args):
        if self._failed:
            return
        try:
            call(*args)
        except Exception as error:  # noqa: BLE001
            self._failed = True
            logger.warning("%s stopped recording: %s (metrics.jsonl goes on)", self._name, _first_line(error))

    def log(self, step, metrics):
        """Passes on."""
        self._try(self._tracker.log, step, metrics)

    def close(self):
        """Passes on."""
        self._try(self._tracker.close)


def open_trackers(
    config: TrackConfig, workdir: pathlib.Path, name: str, resolved: dict[str, Any], resumed_at: int
) -> list[Tracker]:
    """Every tracker that the config asks for; one that cannot start is left out with a warning."""
    wanted: dict[str, Callable[[], Tracker]] = {}
    if config.tensorboard:
        wanted["TensorBoard"] = lambda: TensorBoard(workdir / "tensorboard")
    if config.wandb != "disabled":
        wanted["W&B"] = lambda: Wandb(config, workdir, name, resolved)
    trackers: list[Tracker] = [Jsonl(workdir / "metrics.jsonl", resumed_at)]
    for tracker, start in wanted.items():
        try:
            trackers.append(Guarded(tracker, start()))
        except Exception as error:  # noqa: BLE001
            logger.warning("%s is off for this run: %s (metrics.jsonl goes on)", tracker, _first_line(error))
    return trackers


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        hosts = netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return any("wandb" in host for host in hosts)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
