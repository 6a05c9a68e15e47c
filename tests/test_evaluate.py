"""`python -m lcx.evaluate`: the loss that training reported, other lengths, and one line for what cannot be."""

import json
import math
import shutil

import pytest

from lcx import command, evaluate
from lcx.train_loop import loop, trained
from tests.experiments import small

# A layer kind of its own and, in a mixer that is not used, an infinity: config.json has to give them back as they were.
FIELDS = dict(
    pattern=("local",),
    layers={"local": dict(mixer="blockwise", window=(7, None))},
    ffn="dense",
    ffns__dense__width=48,
    mixers__mamba2__dt_limit=(0.5, math.inf),
    model__layers=1,
    sequence__length=32,
    data__source="copy",
    datasets__copy__symbols=6,
    datasets__copy__held_out_rows=12,
    train__steps=3,
    train__batch=4,
    train__accumulate=2,
    evaluate__batches=2,
    evaluate__buckets=2,
    checkpoint__every=2,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(workdir, held-out figures) of a finished run."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    return workdir, loop.Run(small(**FIELDS), workdir).train()["held_out"]


@pytest.fixture
def cli(monkeypatch, capsys):
    """cli(*arguments) -> (exit status, stdout, stderr) of `python -m lcx.evaluate`."""
    monkeypatch.setattr(command, "prepare_platform", lambda: None)

    def run(*arguments):
        status = command.status(evaluate.run, [str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run


def written(workdir, length):
    return json.loads((workdir / f"evaluation-{length}.json").read_text())


def test_the_loss_is_the_one_that_training_reported(finished, cli):
    workdir, held_out = finished
    before = {path: path.read_bytes() for path in workdir.glob("*.json*")}
    status, out, _ = cli("--workdir", workdir)
    assert status == 0 and f"{held_out['loss']:.4f} nats per token" in out and "% rows exact" in out
    found = written(workdir, 32)
    assert found["held_out"] == json.loads(json.dumps(held_out)) and found["step"] == 3
    assert found["implementations"]["attention"][0]["winner"] == "chunked"
    assert all(path.read_bytes() == content for path, content in before.items()), "the run's own files stay"


def test_another_length_other_rows_and_another_batch(finished, cli):
    workdir, held_out = finished
    rows = ["--config.train.batch=1", "--config.evaluate.batches=99", "--config.datasets.copy.held_out_rows=5"]
    assert cli("--workdir", workdir, "--config.sequence.length=128", *rows)[0] == 0
    found = written(workdir, 128)
    assert found["held_out"]["tokens"] == 5 * 64 and found["held_out"]["by_position"][-1]["stop"] == 128
    assert found["held_out"]["loss"] != held_out["loss"]


def test_the_parameters_are_those_of_the_newest_checkpoint_that_is_whole(finished, cli, tmp_path):
    """With the last one damaged the loss is another, and the damaged one stays where it is."""
    workdir, held_out = finished
    damaged = shutil.copytree(workdir, tmp_path / "damaged")
    manifest = damaged / "checkpoints" / "3" / "lcx_manifest.json"
    manifest.write_text("{}")
    status, out, _ = cli("--workdir", damaged)
    assert status == 0 and "warning: passed over a damaged checkpoint" in out and manifest.exists()
    assert written(damaged, 32)["step"] == 2 and written(damaged, 32)["held_out"]["loss"] != held_out["loss"]


def test_config_json_gives_the_experiment_back(finished):
    workdir, _ = finished
    stated, again = small(**FIELDS), trained.load(workdir, {"train.accumulate": "2"})
    assert again == stated


@pytest.mark.parametrize(
    "arguments,texts",
    [
        (["--config.model.dim=64"], ["embedding_VD: (7, 32) -> (7, 64)", "more"]),
        (["--config.datasets.copy.symbols=9"], ["embedding_VD: (7, 32) -> (10, 32)"]),
        (["--config.ffn=none"], ["stacks.0.ffn.", "-> absent"]),
        (["--config.model.width=3"], ["config field='model.width' is not known"]),
        (["--config.sequence.length=long"], ["sequence.length='long' is not of type int"]),
        (["--config.scale=full"], ["config.scale: the run was a full one"]),
        (["--config", "configs/tiny.py"], ["argument='--config' is not known"]),
    ],
)
def test_a_users_mistake_is_one_line(finished, cli, arguments, texts):
    status, out, error = cli("--workdir", finished[0], *arguments)
    assert status == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert all(text in error for text in texts)


def test_a_workdir_without_a_run_is_one_line(finished, cli, tmp_path):
    workdir, _ = finished
    status, _, error = cli("--workdir", workdir.with_name("finishd"))
    assert status == 2 and f"did you mean '{workdir}'" in error and error.count("\n") == 1
    assert not workdir.with_name("finishd").exists()
    assert cli("--workdir", tmp_path / "none")[2].count("is not known (valid: none)") == 1
    assert "required: --workdir" in cli()[2]
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.json").write_text((workdir / "config.json").read_text())
    assert "has no checkpoint" in cli("--workdir", begun)[2]
    (begun / "config.json").write_text("{")
    assert "is not JSON" in cli("--workdir", begun)[2]
