"""The training run: bad steps, accumulation, memory, what cannot start and what a run leaves behind."""

import contextlib
import json
import os
import pathlib
import signal

import jax
import numpy as np
import pytest
from flax import nnx

from lcx.planning import memory
from lcx.pretrained import Pretrained
from lcx.registry import UserError
from lcx.train_loop import fitting, loop, record, step
from lcx.train_loop.workdir import claim
from tests.runs import logged


def test_a_run_leaves_its_record_and_its_loss_falls(run_of):
    run = run_of(train__steps=30, optimizer__learning_rate=1e-2, checkpoint__every=0)
    summary = run.train()
    losses = logged(run.workdir)
    assert losses[30] < losses[1] - 0.5
    record = json.loads((run.workdir / "run.json").read_text())
    assert record["implementations"]["attention"][0]["winner"] == "chunked"
    assert record["parameters"]["total"] == sum(x.size for x in jax.tree.leaves(run.plan.shapes))
    assert record["mesh"]["devices"] == ["data 0  fsdp 0  tensor 0 | seq: 0"]
    assert json.loads((run.workdir / "config.json").read_text())["train"]["steps"] == 30
    assert json.loads((run.workdir / "summary.json").read_text())["held_out"] == summary["held_out"]
    total = sum(band["loss"] * band["tokens"] for band in summary["held_out"]["by_position"])
    assert abs(total / summary["held_out"]["tokens"] / summary["held_out"]["loss"] - 1) < 1e-6


def test_bad_steps_are_skipped_counted_and_end_the_run(run_of):
    run = run_of(
        optimizer__learning_rate=1e30,
        optimizer__clip_norm=0.0,
        optimizer__schedule="constant",
        train__steps=20,
        train__max_bad_steps=3,
    )
    summary = run.train()
    assert summary["ending"] == "diverged" and summary["skipped"] == 3
    skipped = logged(run.workdir, "skipped")
    assert max(skipped.values()) == 3
    for line in (run.workdir / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (run.workdir / "checkpoints" / str(summary["step"])).is_dir()


def test_accumulation_equals_one_big_batch_with_uneven_padding(run_of):
    """The parts of a batch hold different numbers of valid tokens, so means of means would differ."""
    results = []
    for count in (1, 2, 4):
        run = run_of(f"a{count}", train__accumulate=count, train__batch=4, sequence__length=512, data__packing="none")
        batch = next(run.loader)
        weights = np.asarray(batch["weights_BS"]).sum(1)
        assert len(set(weights.tolist())) > 1
        with jax.set_mesh(run.mesh):
            state = loop.init_state(loop.init_params(run.experiment, run.plan, run.mesh), run.optimizer, run.shardings)
            _, metrics = jax.jit(step.make_train_step(run.experiment, run.plan, run.optimizer, run.mesh))(state, batch)
        results.append((float(metrics["loss"]), float(metrics["grad_norm"]), float(metrics["weight"])))
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], rtol=2e-6)


def test_init_from_starts_at_the_published_loss(run_of):
    """The first loss of a run that starts from a checkpoint is not that of random weights."""
    fixture = pathlib.Path(__file__).parent / "fixtures" / "llama_gqa_untied"
    fields = dict(model__vocab=96, data__source="copy", train__steps=1, checkpoint__every=0)
    fields |= {"datasets__copy__symbols": 90}
    random = run_of("random", **fields)
    published = run_of("published", init_from=str(fixture), **fields)
    random.train(), published.train()
    assert abs(logged(random.workdir)[1] - logged(published.workdir)[1]) > 0.1
    params = Pretrained(str(fixture), published.experiment, published.plan).params(published.mesh)
    with jax.set_mesh(published.mesh):
        model = nnx.merge(published.plan.graph, params)
        published.loader.reset()
        batch = next(published.loader)
        ctx = step.context(batch, published.experiment, published.mesh)
        logits = model.logits(batch["tokens_BS"], ctx)
    nll = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.asarray(batch["labels_BS"])[..., None], -1)[..., 0]
    weights = np.asarray(batch["weights_BS"])
    np.testing.assert_allclose(logged(published.workdir)[1], (nll * weights).sum() / weights.sum(), rtol=1e-5)


def test_a_workdir_belongs_to_one_run_at_a_time(run_of):
    with claim(run_of().workdir), pytest.raises(UserError, match="in use by another run"):
        run_of().train()


def test_a_workdir_that_is_a_file_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--workdir="), claim(tmp_path / "file"):
        pass


def test_checkpoints_that_are_a_file_are_one_line(run_of):
    (run_of("taken").workdir).mkdir(parents=True)
    (run_of("taken").workdir / "checkpoints").write_text("")
    with pytest.raises(UserError, match="checkpoints of --workdir='.*' cannot be used as a folder"):
        run_of("taken").train()


@pytest.mark.parametrize("what", ["another model", "other data"])
def test_what_cannot_start_is_found_before_compiling(run_of, monkeypatch, what):
    """Compiling takes minutes at scale."""
    if what == "other data":
        run_of("started").train()
        run = run_of("started")
        (run.workdir / "summary.json").unlink()
        monkeypatch.setattr(run.loader, "_identity", run.loader._identity | {"data": "another store"})
    else:
        run = run_of("elsewhere", init_from="/nowhere")
    monkeypatch.setattr(run, "_compile", lambda *_: pytest.fail("compiled first"))
    with pytest.raises(UserError, match="init_from='/nowhere'|the data cannot be resumed: data was"):
        run.train()


def test_a_layer_that_sees_what_it_predicts_is_refused(run_of):
    with pytest.raises(UserError, match="causal=False sees the next token"):
        run_of(mixers__blockwise__causal=False)


def test_bytes_are_not_the_tokens_of_a_checkpoint(run_of):
    fixture = pathlib.Path(__file__).parent / "fixtures" / "llama_gqa_untied"
    run = run_of("bytes", model__vocab=300, init_from=str(fixture))
    with pytest.raises(UserError, match="data.tokenizer='bytes': the checkpoint .* has 300 tokens.*tokenizer.json"):
        run.train()


def test_rows_that_are_mostly_padding_are_warned_of(run_of, capsys):
    run_of("short", sequence__length=8192)
    lines = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert [line.split()[1] for line in lines] == ["held-out"] and "% full: text_folder has too little text" in lines[0]
    run_of("full")
    assert "warning" not in capsys.readouterr().out


def test_a_stop_asked_for_while_compiling_is_heard(run_of, monkeypatch):
    """The step after it is the last."""
    run = run_of("stopped")
    compile_steps = run._compile
    monkeypatch.setattr(run, "_compile", lambda *batch: [compile_steps(*batch), os.kill(os.getpid(), signal.SIGTERM)][0])
    assert run.train() == {"ending": "stopped", "step": 1}
    assert (run.workdir / "checkpoints" / "1").exists()


def test_no_held_out_data_is_an_error_before_the_first_step(run_of):
    with pytest.raises(UserError, match="held_out"):
        run_of(data__held_out_fraction=0.0).train()
    assert not (run_of().workdir / "metrics.jsonl").exists()


def test_a_step_that_does_not_fit_is_one_line_with_the_figures(run_of, monkeypatch, capsys):
    monkeypatch.setattr(memory, "memory_stats", lambda device: dict(bytes_limit=2**10))
    with pytest.raises(UserError, match=r"sequence.length=32 with block.remat=minimal needs 0.0 GiB on each cpu and it has 0.0"):
        run_of().train()
    assert "compiling it again with block.remat=minimal" in capsys.readouterr().out
    assert not (run_of().workdir / "run.json").exists()


@pytest.mark.parametrize("keep,compiles", [("auto", ["attention", "minimal"]), ("attention", ["attention"])])
def test_auto_remat_keeps_less_where_more_does_not_fit(run_of, monkeypatch, keep, compiles):
    """The first program is said not to fit; a named policy is not replaced by another."""
    tried, real = [], fitting.compile_train_step

    def compile_step(experiment, *args):
        tried.append(experiment.block.remat)
        if len(tried) == 1:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in hbm. Used 20.1G of 15.7G hbm.")
        return real(experiment, *args)

    monkeypatch.setattr(fitting, "compile_train_step", compile_step)
    run = run_of(block__remat=keep)
    with contextlib.nullcontext() if keep == "auto" else pytest.raises(UserError, match="needs 20.1G of hbm .* it has 15.7G"):
        run.train()
        assert record.read_json(run.workdir / "run.json")["remat"] == "minimal"
    assert tried == compiles


def test_a_compiler_failure_that_is_not_about_memory_is_ours():
    assert fitting.out_of_memory(jax.errors.JaxRuntimeError("INTERNAL: Mosaic failed")) is None


def test_the_logged_learning_rate_is_the_one_applied_after_a_skipped_step(run_of):
    """A skipped step does not move the schedule: the rate logged after it is that of the optimizer's own count."""
    run = run_of()
    with jax.set_mesh(run.mesh):
        state = loop.init_state(loop.init_params(run.experiment, run.plan, run.mesh), run.optimizer, run.shardings)
        one = jax.jit(step.make_train_step(run.experiment, run.plan, run.optimizer, run.mesh))
        batch = next(run.loader)
        rates = []
        for scale in (1.0, np.nan, 1.0):
            state, metrics = one(state, batch | {"weights_BS": batch["weights_BS"] * scale})
            rates.append(float(metrics["learning_rate"]))
    assert int(state.skipped) == 1 and rates[1] == rates[2] > rates[0]
