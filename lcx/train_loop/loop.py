"""The training run: set up, continue from a checkpoint, step, evaluate, save, report."""

import math
import pathlib
import resource
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lcx.data.loader import Loader, make_loader
from lcx.experiment import Experiment, sizes_of
from lcx.mesh import make_mesh
from lcx.ops import dispatch
from lcx.pretrained import load_params
from lcx.train_loop import optimizer as optimizers
from lcx.train_loop import record, screen, trackers
from lcx.train_loop.checkpoint import Checkpoints
from lcx.train_loop.evaluation import evaluate
from lcx.train_loop.state import TrainState, init_params, init_state, plan_model, state_shardings
from lcx.train_loop.step import make_eval_step, make_train_step
from lcx.train_loop.stopping import StopRequest
from lcx.train_loop.throughput import Throughput


class Run:
    """One training run in one workdir: `Run(experiment, workdir).train()`."""

    def __init__(self, experiment: Experiment, workdir: pathlib.Path):
        self.experiment, self.workdir = experiment, workdir
        workdir.mkdir(parents=True, exist_ok=True)
        self.screen = screen.Screen(experiment.train.steps)
        sizes = experiment.mesh_sizes
        self.mesh = make_mesh(**sizes, devices=jax.devices()[: math.prod(sizes.values())])
        self.loader = self._loader("train")
        self.plan = plan_model(experiment, sizes_of(experiment, self.loader.vocab_size))
        self.optimizer = optimizers.build(experiment.optimizer, experiment.train.steps, self.plan.infos)
        self.shardings = state_shardings(self.optimizer, self.plan, self.mesh)
        self.eval_step = jax.jit(make_eval_step(experiment, self.plan, self.mesh))
        self.throughput = Throughput(experiment, self.plan)
        self.sinks: list[trackers.Tracker] = []
        self.last: dict[str, Any] = {}

    def _loader(self, split: str) -> Loader:
        e = self.experiment
        return make_loader(e.data, e.dataset, split=split, mesh=self.mesh, batch=e.train.batch, sequence_length=e.sequence.length)

    def train(self) -> dict[str, Any]:
        """Runs to `train.steps`, to a request to stop or to too many bad steps, and returns the summary.

        Raises:
          UserError: something in the config, the data or the workdir stands against it.
        """
        e = self.experiment
        checkpoints = Checkpoints(self.workdir / "checkpoints", e.checkpoint, e.resolved)
        try:
            with jax.set_mesh(self.mesh):
                state, first = self._state(checkpoints)
                batch = next(self.loader)
                step_fn = self._compile(state, batch)
                if jax.process_index() == 0:
                    self.sinks = trackers.open_trackers(e.track, self.workdir, e.run.name, e.resolved, first)
                self.screen.start(first)
                try:
                    state, ending = self._steps(state, first, batch, step_fn, checkpoints)
                finally:
                    self.screen.stop()
                return self._finish(state, ending)
        finally:
            checkpoints.close()
            for sink in self.sinks:
                sink.close()

    def _state(self, checkpoints: Checkpoints) -> tuple[TrainState, int]:
        """The newest good checkpoint's state and step, or a fresh state and 0."""
        counter = jax.ShapeDtypeStruct((), jnp.int32)
        moments = jax.eval_shape(self.optimizer.init, self.plan.shapes)
        restored = checkpoints.restore(TrainState(self.plan.shapes, moments, counter, counter, counter), self.shardings)
        if restored is None:
            e = self.experiment
            start = (
                load_params(e.train.init_from, e, self.plan, self.mesh)
                if e.train.init_from
                else init_params(e, self.plan, self.mesh)
            )
            return init_state(start, self.optimizer, self.shardings), 0
        for line in restored.rejected:
            self.screen.say(f"warning: passed over a damaged checkpoint: {line}")
        self.loader.restore(restored.loader)
        self.screen.say(f"continuing after step {restored.step}")
        return restored.state, restored.step

    def _compile(self, state: TrainState, batch: dict[str, jax.Array]) -> Callable:
        """The compiled step; run.json and the opening lines are written from it before anything runs."""
        e = self.experiment
        step = make_train_step(e, self.plan, self.optimizer, self.mesh)
        with dispatch.recording(require=e.require) as choices:
            compiled = jax.jit(step, out_shardings=(self.shardings, None), donate_argnums=0).lower(state, batch).compile()
        sizes = compiled.memory_analysis()
        memory = {"arguments": sizes.argument_size_in_bytes, "temporary": sizes.temp_size_in_bytes}
        written = record.run_record(e, self.plan, self.mesh, choices.as_dict(), memory)
        if jax.process_index() == 0:
            record.write_json(self.workdir / "config.json", e.resolved)
            record.write_json(self.workdir / "run.json", written)
        self.screen.opening(e, written, str(self.workdir))
        return compiled

    def _steps(self, state, first, batch, step_fn, checkpoints) -> tuple[TrainState, str]:
        """The loop proper. A step's metrics are read while the next one runs, so the device never waits for the host."""
        e, waiting, ending = self.experiment, None, "finished"
        self.throughput.start()
        # An array that slips onto the device step by step would cost every step; the loader lets its own batches through.
        with StopRequest() as request, jax.transfer_guard_host_to_device("disallow"):
            for step in range(first + 1, e.train.steps + 1):
                state, metrics = step_fn(state, batch)
                position = self.loader.state()  # of the iterator after this step's batch; the next one is read ahead
                if step < e.train.steps:
                    batch = next(self.loader)
                bad_in_row = self._report(*waiting) if waiting else 0
                waiting = (step, metrics)
                if request.now(step):
                    ending = "stopped"
                due = lambda every, step=step: every and step % every == 0
                last = step == e.train.steps or ending == "stopped"
                if last or due(e.checkpoint.every) or due(e.evaluate.every):
                    bad_in_row = self._report(*waiting)
                    waiting = None
                if bad_in_row >= e.train.max_bad_steps:
                    ending = "diverged"
                if last or due(e.checkpoint.every) or ending == "diverged":
                    checkpoints.save(step, state, position)
                if due(e.evaluate.every) and not last:
                    self._log(step, _prefixed(self._evaluate(state)))
                    self.throughput.start()
                if ending != "finished":
                    break
        return state, ending

    def _report(self, step: int, metrics: dict[str, jax.Array]) -> int:
        """Reads a finished step's metrics, logs them when it is time, and returns the bad steps in a row."""
        e, values = self.experiment, {name: float(value) for name, value in metrics.items()}
        self.throughput.add(values.pop("score_flops"))
        self.screen.advance(step)
        bad_in_row, values["skipped"] = int(values.pop("bad_in_row")), int(values["skipped"])
        if step % e.train.log_every == 0 or step == e.train.steps or step == 1 or bad_in_row:
            values |= self.throughput.line()
            values |= memory_figures()
            self.screen.line(step, values)
            self._log(step, values)
            self.last = values
        return bad_in_row

    def _log(self, step: int, values: dict[str, Any]) -> None:
        for sink in self.sinks:
            sink.log(step, values)

    def _evaluate(self, state: TrainState) -> dict[str, Any]:
        found = evaluate(self.eval_step, state.params, self._loader("held_out"), self.experiment)
        self.screen.say(f"held-out loss {found['loss']:.4f}, perplexity {found['perplexity']:.3f}")
        return found

    def _finish(self, state: TrainState, ending: str) -> dict[str, Any]:
        """The last evaluation, summary.json and the closing table; nothing of it after a request to stop."""
        step = int(state.step)
        if ending == "stopped":
            self.screen.say(f"stopped after step {step}; the state is saved, the same command continues")
            return {"ending": ending, "step": step}
        held_out = self._evaluate(state)
        self._log(step, _prefixed(held_out))
        figures = memory_figures()
        summary = {
            "ending": ending,
            "step": step,
            "skipped": int(state.skipped),
            "scale": self.experiment.scale,
            "sequence_length": self.experiment.sequence.length,
            "held_out": held_out,
            "last_step": self.last,
            **figures,
            "files": {name: str(self.workdir / name) for name in ("metrics.jsonl", "run.json", "checkpoints", "summary.json")},
        }
        if jax.process_index() == 0:
            record.write_json(self.workdir / "summary.json", summary)
        self.screen.closing(self.experiment, summary)
        return summary


def _prefixed(held_out: dict[str, Any]) -> dict[str, Any]:
    return {f"held_out_{name}": value for name, value in held_out.items()}


def memory_figures() -> dict[str, int]:
    """device_peak_bytes where the device counts it, and host_peak_bytes of this process."""
    host = {"host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    stats = jax.local_devices()[0].memory_stats()
    return host | ({"device_peak_bytes": stats["peak_bytes_in_use"]} if stats else {})
