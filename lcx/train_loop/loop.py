"""The training run: compile, set up or continue from a checkpoint, step, evaluate, save, report."""

import contextlib
import math
import pathlib
import resource
from collections.abc import Callable
from typing import Any

import jax

from lcx.data.loader import Loader, make_loader
from lcx.experiment import Experiment, sizes_of
from lcx.mesh import make_mesh
from lcx.ops import dispatch
from lcx.pretrained import Pretrained
from lcx.train_loop import optimizer as optimizers
from lcx.train_loop import preflight, record, screen, trackers
from lcx.train_loop.checkpoint import Checkpoints, Found
from lcx.train_loop.evaluation import evaluate
from lcx.train_loop.fitting import compile_fitting
from lcx.train_loop.identity import identity
from lcx.train_loop.state import TrainState, abstract_state, init_params, init_state, plan_model, state_shardings
from lcx.train_loop.step import Batch, compile_eval_step
from lcx.train_loop.stopping import StopRequest
from lcx.train_loop.throughput import Throughput
from lcx.train_loop.workdir import claim


class Run:
    """One training run in one workdir: `Run(experiment, workdir).train()`."""

    def __init__(self, experiment: Experiment, workdir: pathlib.Path):
        preflight.check_objective(experiment)
        self.experiment, self.workdir = experiment, workdir
        self.screen = screen.Screen(experiment.train.steps)
        self.screen.announce(experiment)
        sizes = experiment.mesh_sizes
        self.mesh = make_mesh(**sizes, devices=jax.devices()[: math.prod(sizes.values())])
        with self.screen.doing(f"preparing the data of {experiment.data.source}"):
            self.loader, self.held_out = self._loader("train"), self._loader("held_out")
        for line in preflight.padding_warnings(experiment, {"training": self.loader, "held-out": self.held_out}):
            self.screen.say(line)
        self.plan = plan_model(experiment, sizes_of(experiment, self.loader.vocab_size))
        self.optimizer = optimizers.build(experiment.optimizer, experiment.train.steps, self.plan.infos)
        self.shardings = state_shardings(self.optimizer, self.plan, self.mesh)
        self.sinks: list[trackers.Tracker] = []
        self.last: dict[str, Any] = {}

    def _loader(self, split: str) -> Loader:
        e = self.experiment
        return make_loader(e.data, e.dataset, split=split, mesh=self.mesh, batch=e.train.batch, sequence_length=e.sequence.length)

    def train(self) -> dict[str, Any]:
        """Runs to `train.steps`, to a request to stop or to too many bad steps, and returns the summary.

        Raises:
          UserError: something in the config, the data, the workdir or the device's memory stands against it.
        """
        e = self.experiment
        with contextlib.ExitStack() as stack:
            stack.enter_context(claim(self.workdir))
            stack.callback(lambda: [sink.close() for sink in self.sinks])
            checkpoints = Checkpoints(self.workdir / "checkpoints", e.checkpoint, identity(e))
            stack.callback(checkpoints.close)
            stack.enter_context(jax.set_mesh(self.mesh))
            # Before compiling, which takes minutes: is there anything to do, and may this run go on from what is there?
            request = stack.enter_context(StopRequest())
            found = checkpoints.find()
            done = record.read_json(self.workdir / "summary.json")
            if done and found and found.step == e.train.steps:
                self.screen.say(f"this run is finished; choose another --workdir than {self.workdir} for a new one")
                self.screen.closing(e, done, self.workdir)
                return done
            pretrained = preflight.open_pretrained(e, self.plan) if e.run.init_from and not found else None
            if found:
                self.loader.restore(found.loader)
            step_fn, eval_fn = self._compile(next(self.loader), next(self.held_out))
            self.throughput = Throughput(self.experiment, self.plan, self.mesh)
            self.loader.reset()
            state, first = self._state(checkpoints, found, pretrained)
            if jax.process_index() == 0:
                self.sinks = trackers.open_trackers(e.track, self.workdir, e.run.name, e.resolved, first)
            self.screen.start(first)
            try:
                state, ending = self._steps(state, first, step_fn, eval_fn, checkpoints, request)
            finally:
                self.screen.stop()
            return self._finish(state, ending, eval_fn)

    def _compile(self, batch: Batch, held_out: Batch) -> tuple[Callable, Callable]:
        """The compiled training and evaluation steps.

        Nothing is allocated before the compiler has said that it fits. run.json and the opening lines come from here.
        """
        compiling = self.screen.doing("compiling the training step")
        with dispatch.recording(require=self.experiment.require) as choices, compiling:
            fitted = compile_fitting(self.experiment, self.plan.sizes, self.optimizer, self.mesh, batch, say=self.screen.say)
            e, self.experiment, self.plan = fitted.experiment, fitted.experiment, fitted.plan
            params = abstract_state(self.optimizer, self.plan, self.mesh).params
            evaluation = compile_eval_step(e, self.plan, self.mesh, params, held_out)
        written = record.run_record(e, self.plan, self.mesh, choices.as_dict(), fitted.bytes)
        if jax.process_index() == 0:
            record.write_json(self.workdir / "config.json", e.resolved)
            record.write_json(self.workdir / "run.json", written)
        self.screen.opening(e, written, str(self.workdir))
        return fitted.step, evaluation

    def _state(self, checkpoints: Checkpoints, found: Found | None, pretrained: Pretrained | None) -> tuple[TrainState, int]:
        """The state and step to start from: those of the checkpoint that was found, or a fresh state and 0."""
        if found is None:
            fresh = lambda: init_params(self.experiment, self.plan, self.mesh)
            params = pretrained.params(self.mesh) if pretrained else fresh()
            return init_state(params, self.optimizer, self.shardings), 0
        for line in found.rejected:
            self.screen.say(f"warning: passed over a damaged checkpoint: {line}")
        self.loader.restore(found.loader)
        self.screen.say(f"continuing after step {found.step}")
        return checkpoints.restore(found.step, abstract_state(self.optimizer, self.plan, self.mesh)), found.step

    def _steps(self, state, first, step_fn, eval_fn, checkpoints, request) -> tuple[TrainState, str]:
        """The loop proper. A step's metrics are read while the next one runs, so the device never waits for the host."""
        e, waiting, ending = self.experiment, None, "finished"
        batch = next(self.loader) if first < e.train.steps else None
        self.throughput.start()
        # An array that slips onto the device step by step would cost every step; the loader lets its own batches through.
        with jax.transfer_guard_host_to_device("disallow"):
            for step in range(first + 1, e.train.steps + 1):
                state, metrics = step_fn(state, batch)
                position = self.loader.state()  # of the iterator after this step's batch; the next one is read ahead
                if step < e.train.steps:
                    batch = next(self.loader)
                bad_in_row = self._report(*waiting) if waiting else 0
                waiting = (step, metrics)
                due = lambda every, step=step: every and step % every == 0
                if bad_in_row >= e.train.max_bad_steps:
                    ending = "diverged"
                elif request.now(step):
                    ending = "stopped"
                last = step == e.train.steps or ending != "finished"
                if last or due(e.checkpoint.every) or due(e.evaluate.every):
                    bad_in_row = self._report(*waiting)
                    waiting = None
                    ending = "diverged" if bad_in_row >= e.train.max_bad_steps else ending
                    last = last or ending == "diverged"
                # Evaluated before saving: a run killed in between evaluates again, and no line is missing.
                if due(e.evaluate.every) and not last:
                    self._log(step, _prefixed(self._evaluate(state, eval_fn)))
                    self.throughput.start()
                if last or due(e.checkpoint.every):
                    checkpoints.save(step, state, position)
                    self.throughput.start()
                if ending != "finished":
                    break
        return state, ending

    def _report(self, step: int, metrics: dict[str, jax.Array]) -> int:
        """Reads a finished step's metrics, logs them when it is time, and returns the bad steps in a row."""
        e, values = self.experiment, {name: float(value) for name, value in metrics.items()}
        self.throughput.add(values.pop("tokens"), values.pop("score_flops"))
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

    def _evaluate(self, state: TrainState, eval_fn: Callable) -> dict[str, Any]:
        self.held_out.reset()
        found = evaluate(eval_fn, state.params, self.held_out, self.experiment)
        self.screen.say(f"held-out loss {found['loss']:.4f}, perplexity {found['perplexity']:.3f}")
        return found

    def _finish(self, state: TrainState, ending: str, eval_fn: Callable) -> dict[str, Any]:
        """The last evaluation, summary.json and the closing table; nothing of it after a request to stop."""
        step = int(state.step)
        if ending == "stopped":
            self.screen.say(f"stopped after step {step}; the state is saved, the same command continues")
            return {"ending": ending, "step": step}
        with self.screen.doing("evaluating on held-out data"):
            held_out = self._evaluate(state, eval_fn)
        self._log(step, _prefixed(held_out))
        if ending == "finished" and (int(state.skipped) == step or not math.isfinite(held_out["loss"])):
            ending = "diverged"
        summary = {
            "ending": ending,
            "step": step,
            "skipped": int(state.skipped),
            "scale": self.experiment.scale,
            "sequence_length": self.experiment.sequence.length,
            "held_out": held_out,
            "last_step": self.last,
        } | memory_figures()
        if jax.process_index() == 0:
            record.write_json(self.workdir / "summary.json", summary)
        self.screen.closing(self.experiment, summary, self.workdir)
        return summary


def _prefixed(held_out: dict[str, Any]) -> dict[str, Any]:
    return {f"held_out_{name}": value for name, value in held_out.items()}


def memory_figures() -> dict[str, int]:
    """device_peak_bytes where the device counts it, and host_peak_bytes of this process."""
    host = {"host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    stats = jax.local_devices()[0].memory_stats()
    return host | ({"device_peak_bytes": stats["peak_bytes_in_use"]} if stats else {})
