"""A run read back from its workdir: the experiment of its config.json and its newest parameters, evaluated on held-out data."""

import contextlib
import json
import math
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh

from lcx import config, registry
from lcx.data.loader import make_loader
from lcx.experiment import Experiment, resolve, sizes_of
from lcx.mesh import make_mesh
from lcx.ops import dispatch
from lcx.planning.memory import compiled_bytes, shortfall
from lcx.registry import UserError
from lcx.sharding import parameter_shardings
from lcx.train_loop import record, screen
from lcx.train_loop.checkpoint import Checkpoints
from lcx.train_loop.evaluation import evaluate
from lcx.train_loop.fitting import out_of_memory
from lcx.train_loop.state import ModelPlan, plan_model
from lcx.train_loop.step import Batch, compile_eval_step
from lcx.train_loop.workdir import claim


def load(workdir: pathlib.Path, overrides: dict[str, str]) -> Experiment:
    """The experiment of the run in a workdir, with `a.b.c -> text` from the command line in place of what it states.

    Raises:
      UserError: there is no run, its config.json cannot be read, or a field or value is wrong.
    """
    file = workdir / "config.json"
    if not file.is_file():
        raise registry.unknown("--workdir", str(workdir), sorted(str(f.parent) for f in workdir.parent.glob("*/config.json")))
    try:
        stated = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}") from error
    if "scale" in overrides:
        raise UserError(f"config.scale: the run was a {stated['scale']} one; override the fields that shall differ")
    conf = config.base()
    with conf.unlocked():
        conf.layers = ml_collections.ConfigDict(_stored(stated.pop("layers")))
    del stated["rehearsal"]  # its values are in the fields that it changed
    for field, value in _leaves(stated):
        config.assign(conf, field, value, origin=str(file))
    conf.train.accumulate = 1  # an evaluation cuts no batch
    for field, text in overrides.items():
        config.assign(conf, field, text, origin="command line")
    return resolve(conf, conf.sequence.length)


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, _stored(value)


def _stored(value: Any) -> Any:
    """A value of config.json as the config has it: JSON has no tuples, and infinity is a text there."""
    if isinstance(value, dict):
        return {name: _stored(x) for name, x in value.items()}
    if isinstance(value, list):
        return tuple(_stored(x) for x in value)
    return float(value) if value in ("inf", "-inf") else value


def evaluate_run(experiment: Experiment, workdir: pathlib.Path) -> dict[str, Any]:
    """Evaluates the newest undamaged parameters of a run on the held-out data of an experiment, which `load` made.

    Prints the result and writes it to `evaluation-<sequence length>.json` in the workdir.

    Returns:
      step (of the parameters), sequence_length, batch, seconds, held_out (`lcx.train_loop.evaluation.evaluate`) and
      implementations (what computed it).

    Raises:
      UserError: another run holds the workdir; there is no checkpoint, or none of these parameters; no held-out data; or the
        evaluation does not fit the devices.
    """
    e, sizes = experiment, experiment.mesh_sizes
    shown = screen.Screen(e.train.steps)
    mesh = make_mesh(**sizes, devices=jax.devices()[: math.prod(sizes.values())])
    with contextlib.ExitStack() as stack:
        stack.enter_context(claim(workdir))
        checkpoints = Checkpoints(workdir / "checkpoints", e.checkpoint, None)
        stack.callback(checkpoints.close)
        stack.enter_context(jax.set_mesh(mesh))
        if (found := checkpoints.find()) is None:
            raise UserError(f"--workdir={str(workdir)!r} has no checkpoint: the run in it has not saved one yet")
        for line in found.rejected:
            shown.say(f"warning: passed over a damaged checkpoint: {line}")
        with shown.doing(f"preparing the data of {e.data.source}"):
            loader = make_loader(
                e.data, e.dataset, split="held_out", mesh=mesh, batch=e.train.batch, sequence_length=e.sequence.length
            )
        plan = plan_model(e, sizes_of(e, loader.vocab_size))
        homes = parameter_shardings(plan.infos, mesh)
        wanted = jax.tree.map(lambda x, home: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=home), plan.shapes, homes)
        params = checkpoints.restore_params(found.step, wanted)
        with dispatch.recording(require=e.require) as choices, shown.doing("compiling the evaluation step"):
            step = _compiled(e, plan, mesh, params, next(loader))
        loader.reset()
        began = time.perf_counter()
        with shown.doing("evaluating on held-out data"):
            held_out = evaluate(step, params, loader, e)
        evaluation = {
            "step": found.step,
            "sequence_length": e.sequence.length,
            "batch": e.train.batch,
            "seconds": time.perf_counter() - began,
            "held_out": held_out,
            "implementations": choices.as_dict(),
        }
        file = workdir / f"evaluation-{e.sequence.length}.json"
        if jax.process_index() == 0:
            record.write_json(file, evaluation)
        shown.evaluated(e, evaluation, file)
        return evaluation


def _compiled(experiment: Experiment, plan: ModelPlan, mesh: Mesh, params: Any, batch: Batch) -> jax.stages.Compiled:
    """The evaluation step, if it fits."""
    try:
        step = compile_eval_step(experiment, plan, mesh, params, batch)
        missing = shortfall(compiled_bytes(step), next(iter(mesh.local_devices), mesh.devices.flat[0]))
    except jax.errors.JaxRuntimeError as error:
        if (missing := out_of_memory(error)) is None:
            raise
    if missing:
        raise UserError(
            f"sequence.length={experiment.sequence.length} with train.batch={experiment.train.batch} {missing}; "
            "use a smaller batch, more devices (mesh.seq), or a shorter sequence"
        )
    return step
