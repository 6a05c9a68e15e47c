"""Checkpoints: a continued run is the run that never stopped, damage is passed over, another training is refused."""

import json
import shutil

import numpy as np
import pytest

from lcx.registry import UserError
from lcx.train_loop import checkpoint, manifest, record
from lcx.train_loop.identity import identity
from tests.runs import logged


class Killed(BaseException):
    """Stands for kill -9: nothing that follows it in the process runs on purpose."""


def kill_after(run, steps, monkeypatch):
    """Lets `steps` optimizer steps start and dies without saving."""
    compiled = run._compile

    def dying(*args):
        (inner, evaluation), left = compiled(*args), [steps]

        def call(*args):
            if not left[0]:
                raise Killed
            left[0] -= 1
            return inner(*args)

        return call, evaluation

    monkeypatch.setattr(run, "_compile", dying)
    with pytest.raises(Killed):
        run.train()


@pytest.mark.parametrize("deaths", [(5,), (3, 2), (1,)])
def test_a_killed_run_continues_bit_for_bit(run_of, monkeypatch, deaths):
    whole = run_of("whole")
    whole.train()
    for steps in deaths:
        kill_after(run_of("broken"), steps, monkeypatch)
    run_of("broken").train()
    for key in ("loss", "grad_norm", "learning_rate", "held_out_loss"):
        assert logged(run_of("broken").workdir, key) == logged(whole.workdir, key)


def test_another_seed_would_not_pass_for_a_continuation(run_of):
    run_of("a").train()
    run_of("b", seed=1).train()
    assert logged(run_of("a").workdir) != logged(run_of("b").workdir)


def flip_a_bit(directory):
    largest = max((f for f in directory.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)


def test_a_flipped_bit_falls_back_to_the_last_good_step(run_of, capsys):
    run_of().train()
    workdir = run_of().workdir
    losses = logged(workdir)
    flip_a_bit(workdir / "checkpoints" / "8")
    run_of().train()
    assert "does not match its checksum" in capsys.readouterr().out
    assert logged(workdir) == losses


def test_a_checkpoint_that_cannot_be_read_is_passed_over_and_kept(run_of, capsys, monkeypatch):
    """A failing disk: the run goes on from the step before, and what it could not read is moved, not deleted."""
    run_of().train()
    workdir, digest = run_of().workdir, manifest._digest
    losses = logged(workdir)

    def failing(file):
        if "/8/" in str(file):
            raise OSError(5, "Input/output error", str(file))
        return digest(file)

    monkeypatch.setattr(manifest, "_digest", failing)
    run_of(train__log_every=1).train()
    assert "cannot be read (Input/output error)" in capsys.readouterr().out
    assert logged(workdir) == losses
    assert [path.name.split("-")[0] for path in (workdir / "checkpoints-damaged").iterdir()] == ["8"]


@pytest.mark.parametrize("content", ["[]", "{}", "3", "not json"])
def test_a_manifest_that_lists_nothing_is_damage(tmp_path, content):
    (tmp_path / manifest.NAME).write_text(content)
    assert manifest.damage(tmp_path)


def test_only_damaged_checkpoints_are_an_error(run_of):
    run_of().train()
    for saved in (run_of().workdir / "checkpoints").iterdir():
        if saved.is_dir():
            flip_a_bit(saved)
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        run_of().train()


@pytest.mark.parametrize(
    "field,value,text",
    [
        ("model__dim", 64, "model.dim: 32 -> 64"),
        ("optimizer__learning_rate", 1.0, "optimizer.learning_rate"),
        ("train__steps", 9, "train.steps: 8 -> 9"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(run_of, field, value, text):
    run_of().train()
    with pytest.raises(UserError, match=text):
        run_of(**{field: value}).train()


def test_free_fields_may_change_on_continuation(run_of):
    run_of().train()
    straight = logged(run_of().workdir)
    shutil.rmtree(run_of().workdir / "checkpoints" / "8")
    summary = run_of(block__token_chunk=16, block__remat="minimal").train()
    assert summary["step"] == 8
    np.testing.assert_allclose(list(logged(run_of().workdir).values()), list(straight.values()), rtol=1e-6)


def test_differences_name_the_field_and_both_values():
    saved = {"values": {"model.dim": 32, "block.remat": "auto"}, "defaults": {}}
    current = {"values": {"model.dim": 64, "block.remat": "none", "model.new": 7}, "defaults": {"model.new": 7}}
    assert checkpoint.differences(saved, current) == ["model.dim: 32 -> 64"]
    current["values"]["model.new"] = 8
    assert "model.new: 7 -> 8" in checkpoint.differences(saved, current)


def test_another_part_is_one_difference():
    saved = {"values": {"layers.a.mixer": "Ring", "layers.a.mixer.window": None, "layers.a.ffn.width": 8}, "defaults": {}}
    current = {"values": {"layers.a.mixer": "Mamba", "layers.a.mixer.state": 4, "layers.a.ffn.width": 9}, "defaults": {}}
    assert checkpoint.differences(saved, current) == ["layers.a.ffn.width: 8 -> 9", "layers.a.mixer: 'Ring' -> 'Mamba'"]


def test_parts_that_are_not_used_are_not_part_of_the_identity(run_of):
    values = identity(run_of().experiment)["values"]
    assert values["layers.blockwise.mixer"] == "Blockwise" and not any("ulysses" in field for field in values)


def test_a_checkpoint_continues_on_another_mesh(run_of):
    """The losses after a change of mesh are those of one mesh throughout, to rounding."""
    fields = dict(pattern=("ring",), sequence__length=64, evaluate__every=0)
    whole = run_of("whole", **fields)
    whole.train()
    first = run_of("moved", **fields)
    first.train()
    shutil.rmtree(first.workdir / "checkpoints" / "8")
    run_of("moved", mesh__seq=2, mesh__fsdp=2, **fields).train()
    moved, straight = logged(first.workdir), logged(whole.workdir)
    np.testing.assert_allclose([moved[s] for s in straight], list(straight.values()), rtol=2e-5)


def test_a_finished_run_is_left_as_it_is(run_of, capsys):
    summary = run_of().train()
    lines = (run_of().workdir / "metrics.jsonl").read_text()
    capsys.readouterr()
    assert run_of().train() == json.loads(json.dumps(summary))
    assert "this run is finished" in capsys.readouterr().out
    assert (run_of().workdir / "metrics.jsonl").read_text() == lines


def test_a_summary_that_was_cut_short_is_none(tmp_path):
    (tmp_path / "summary.json").write_text('{"ending": "fin')
    assert record.read_json(tmp_path / "summary.json") is None and record.read_json(tmp_path / "nothing.json") is None
