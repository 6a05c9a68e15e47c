"""What a person sees: the run at the top, progress with a time to go, the final table. Plain lines where there is no terminal."""

import contextlib
import math
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from lcx.experiment import Experiment


def figure(value: float, digits: int = 3) -> str:
    """A number as people read it: 1.23M, 4.56K, 0.0123."""
    value = float(f"{value:.{digits}g}")  # rounded first, so that 999,999 is 1M and not 1e+03K
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= limit:
            return f"{value / limit:.{digits}g}{unit}"
    return f"{value:.{digits}g}"


def gib(count: int) -> str:
    """Bytes as MiB or GiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    """Seconds as 1h02m, 3m04s or 5s."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def _table(title: str) -> Table:
    """Two columns without a header; long values go on in the next line."""
    table = Table(title=Text(title), title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    return table


def _add_held_out(table: Table, experiment: Experiment, held_out: dict[str, Any]) -> None:
    """The rows of an evaluation (`lcx.train_loop.evaluation.evaluate`)."""
    unit = "byte" if experiment.data.tokenizer == "bytes" and "exact_match" not in held_out else "token"
    table.add_row("held-out loss", f"{held_out['loss']:.4f} nats per {unit}, perplexity {held_out['perplexity']:.3f}")
    for band in held_out["by_position"]:
        table.add_row(f"  positions {band['start']:,} to {band['stop'] - 1:,}", f"{band['loss']:.4f}")
    if "exact_match" in held_out:
        rows, tokens = 100 * held_out["exact_match"], 100 * held_out["token_accuracy"]
        table.add_row("answers", f"{rows:.1f} % rows exact, {tokens:.1f} % tokens")


class Screen:
    """The output of one run; only process 0 writes."""

    def __init__(self, steps: int):
        self.console = Console(quiet=jax.process_index() != 0, highlight=False, soft_wrap=True)
        if not self.console.is_terminal:
            self.console.width = 1000  # a file has no edge at which a path would have to be cut
        self._steps, self._progress, self._task, self._began, self._first = steps, None, None, 0.0, 0

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(text, markup=False)

    def announce(self, experiment: Experiment) -> None:
        """That a rehearsal is one, before anything that takes time."""
        if experiment.scale == "rehearsal":
            length, full = experiment.sequence.length, experiment.full_length
            real = "as many as the real experiment has" if length == full else f"the real experiment has {full:,}"
            self.say(f"REHEARSAL of {experiment.run.name}: the same code path at {length:,} tokens a sequence; {real}.")

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Shows what takes so long: with a clock on a terminal, as a line elsewhere."""
        if not self.console.is_terminal:
            self.say(f"{what} ...")
            yield
            return
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            progress.add_task(what, total=None)
            yield

    def opening(self, experiment: Experiment, record: dict[str, Any], workdir: str) -> None:
        """What is being run, at which scale, on what."""
        table = _table(f"lcx: {experiment.run.name}")
        rows = {
            "scale": experiment.scale,
            "sequence": f"{experiment.sequence.length:,} tokens, layout {experiment.layout}, batch {experiment.train.batch}",
            "model": f"{figure(record['parameters']['total'])} parameters, {experiment.model.layers} layers of "
            + " ".join(record["pattern"]),
            "data": experiment.data.source,
            "devices": f"{record['device']['count']} x {record['device']['kind']}, mesh "
            + " x ".join(f"{axis} {size}" for axis, size in record["mesh"]["sizes"].items()),
            "operations": ", ".join(f"{op}: {' + '.join(w)}" for op, w in winners(record["implementations"]).items()),
            "memory": f"{gib(record['compiled_step_bytes']['peak'])} a device in the compiled step",
            "files": workdir,
        }
        for name, value in rows.items():
            table.add_row(name, Text(str(value)))
        self.console.print(table)

    def start(self, step: int) -> None:
        """Progress from `step` on."""
        self._began, self._first = time.perf_counter(), step
        if self.console.is_terminal:
            # The spinner and the clock move while a step of a minute does not.
            columns = (SpinnerColumn(), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("to go"))
            self._progress = Progress(*columns, TimeRemainingColumn(), console=self.console)
            self._task = self._progress.add_task("training", total=self._steps, completed=step)
            self._progress.start()

    def advance(self, step: int) -> None:
        """`step` steps are done."""
        if self._progress:
            self._progress.update(self._task, completed=step)

    def line(self, step: int, metrics: dict[str, Any]) -> None:
        """A logged step."""
        elapsed, done = time.perf_counter() - self._began, step - self._first
        to_go = duration(elapsed / done * (self._steps - step)) if done else "?"
        parts = [f"step {step:>{len(str(self._steps))}}/{self._steps}", f"loss {metrics['loss']:.4f}"]
        parts.append(f"|grad| {metrics['grad_norm']:.3g}")
        parts.append(f"lr {metrics['learning_rate']:.2e}")
        if "tokens_per_second" in metrics:
            parts.append(f"{figure(metrics['tokens_per_second'])} tok/s")
            parts.append(f"{metrics['step_seconds']:.3g} s/step")
        if "mfu" in metrics:
            parts.append(f"MFU {100 * metrics['mfu']:.1f} %")
        if metrics["skipped"]:
            parts.append(f"skipped {metrics['skipped']}")
        if not self._progress:
            parts.append(f"{to_go} to go")
        self.say("  ".join(parts))

    def stop(self) -> None:
        """No more progress."""
        if self._progress:
            self._progress.stop()
            self._progress = None

    def closing(self, experiment: Experiment, summary: dict[str, Any], workdir: pathlib.Path) -> None:
        """The final table: what came out, where it lies, what to try next."""
        table = _table("result")
        table.add_row("steps", f"{summary['step']}" + (f" ({summary['skipped']} skipped)" if summary["skipped"] else ""))
        _add_held_out(table, experiment, summary["held_out"])
        if "tokens_per_second" in summary["last_step"]:
            table.add_row("speed", f"{figure(summary['last_step']['tokens_per_second'])} tokens/s")
        for name in ("device", "host"):
            if f"{name}_peak_bytes" in summary:
                table.add_row(f"{name} memory", f"{gib(summary[f'{name}_peak_bytes'])} at most")
        for name in ("metrics.jsonl", "run.json", "summary.json", "checkpoints"):
            table.add_row(name, Text(str(workdir / name)))
        self.console.print(table)
        if summary["ending"] == "diverged":
            self.say(
                "DIVERGED: steps had a non-finite loss or gradient and were skipped, or the held-out loss is not finite; "
                "the parameters are those after the last good step. Try a lower optimizer.learning_rate in another --workdir."
            )
        elif experiment.scale == "rehearsal":
            longer = again(f"sequence.length={2 * experiment.sequence.length}")
            self.say(f"Next: the same command on accelerators runs the real experiment; here, longer: {longer}")
        else:
            self.say(f"Next: change a field, e.g. {again('optimizer.learning_rate=1e-3')}")

    def evaluated(self, experiment: Experiment, evaluation: dict[str, Any], file: pathlib.Path) -> None:
        """The table of an evaluation that is no part of a training: which parameters, on what, what came out."""
        table = _table(f"evaluation of {experiment.run.name}")
        table.add_row("parameters", f"after step {evaluation['step']}")
        table.add_row("sequence", f"{experiment.sequence.length:,} tokens, {experiment.train.batch} at a time")
        _add_held_out(table, experiment, evaluation["held_out"])
        table.add_row("file", Text(str(file)))
        self.console.print(table)


def again(change: str) -> str:
    """The arguments for another run with one field changed, in a workdir of its own."""
    return f"--config.{change} --workdir runs/another"


def winners(implementations: dict[str, Any]) -> dict[str, list[str]]:
    """op -> the implementations that ran."""
    return {op: sorted({choice["winner"] for choice in choices}) for op, choices in implementations.items()}
