"""Configs: precedence, what the command line can say, one line for every mistake."""

import pathlib
import subprocess
import sys

import pytest

from lcx import experiment
from lcx.registry import UserError
from tests.command_line import says

ROOT = pathlib.Path(__file__).parent.parent


# ---- precedence


def test_base_then_experiment_then_rehearsal_then_command_line(config_file):
    lines = "config.train.steps, config.train.batch, config.train.log_every = 20, 3, 7\n"
    lines += "config.rehearsal.update({'train': {'batch': 5, 'log_every': 9}})"
    file, options = config_file(lines), {"scale": "rehearsal", "train.log_every": "11"}
    train_config = experiment.load(file, options).train
    assert train_config.accumulate == 1  # base
    assert train_config.steps == 20  # experiment
    assert train_config.batch == 5  # rehearsal
    assert train_config.log_every == 11  # command line
    assert experiment.load(file, {"scale": "full"}).train.batch == 3
    assert experiment.load(file, {"scale": "full", "train.batch": "8"}).train.batch == 8


def test_a_rehearsal_knows_the_length_of_the_real_experiment(config_file):
    file = config_file("config.scale = 'auto'\nconfig.sequence.length = 4096\nconfig.rehearsal = {'sequence': {'length': 64}}")
    auto = experiment.load(file, {})
    assert (auto.scale, auto.sequence.length, auto.full_length) == ("rehearsal", 64, 4096)
    longer = experiment.load(file, {"sequence.length": "128"})
    assert (longer.scale, longer.sequence.length, longer.full_length) == ("rehearsal", 128, 4096)
    full = experiment.load(file, {"scale": "full", "sequence.length": "8192"})
    assert (full.scale, full.sequence.length, full.full_length) == ("full", 8192, 8192)


def test_a_config_without_rehearsal_runs_in_full_and_says_so_when_asked_to_rehearse(config_file, mistake):
    file = config_file("config.scale = 'auto'")
    assert experiment.load(file, {}).scale == "full"
    says(mistake("--config", file, "--config.scale=rehearsal"), "config.scale='rehearsal'", "states no rehearsal")


def test_the_resolved_config_is_what_ran(config_file):
    resolved = experiment.load(config_file("config.rehearsal = {'train': {'steps': 4}}"), {"scale": "rehearsal"}).resolved
    assert (resolved["scale"], resolved["train"]["steps"], resolved["rehearsal"]) == ("rehearsal", 4, {})


def test_a_mistake_in_the_rehearsal_names_its_field(config_file):
    file = config_file("config.rehearsal = {'train': {'stps': 4}}")
    with pytest.raises(UserError, match="rehearsal: config field='train.stps' is not known; did you mean 'train.steps'"):
        experiment.load(file, {"scale": "rehearsal"})


# ---- what the command line can say


@pytest.mark.parametrize(
    "field,text,value",
    [
        ("model.kv_heads", "2", 2),
        ("model.vocab", "512", 512),
        ("model.kv_heads", "None", None),
        ("model.logit_softcap", "30", 30.0),
        ("model.tied", "true", True),
        ("train.steps", "1_000", 1000),
        ("data.cache_dir", "12", "12"),
        ("loss.chunk", "64", 64),
    ],
)
def test_overrides_are_read_as_the_type_of_their_field(config_file, field, text, value):
    block, name = field.split(".")
    found = getattr(getattr(experiment.load(config_file(), {field: text}), block), name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "text,names", [("ring", ["ring"]), ("('ring','blockwise')", ["ring", "blockwise"]), ("full,ring", ["full", "ring"])]
)
def test_a_pattern_from_the_command_line(config_file, text, names):
    assert [kind.name for kind in experiment.load(config_file(), {"pattern": text}).pattern] == names


@pytest.mark.parametrize("text,window", [("(4095,0)", (4095, 0)), ("None", None), ("(4, None)", (4, None))])
def test_a_window_from_the_command_line(config_file, text, window):
    lines = "config.mixers.ring.window = (7, 0)"
    assert experiment.load(config_file(lines), {"mixers.ring.window": text}).pattern[0].mixer_config.window == window


@pytest.mark.parametrize("arguments", [["--config.train.steps=3"], ["--config.train.steps", "3"]])
def test_both_ways_to_write_an_override_reach_the_run(cli, config_file, arguments):
    status, _, ran = cli("--config", config_file(), *arguments)
    assert status == 0 and ran.train.steps == 3


def test_an_infinity_is_written_as_the_command_line_takes_it(config_file):
    e = experiment.load(config_file("config.pattern = ('mamba2',)"), {"mixers.mamba2.dt_limit": "(0.1, inf)"})
    assert e.resolved["mixers"]["mamba2"]["dt_limit"] == [0.1, "inf"]


# ---- mistakes on the command line


@pytest.mark.parametrize(
    "arguments,parts",
    [
        (["--config.model.layer=3"], ["model.layer", "did you mean 'model.layers'", "model.heads"]),
        (["--config.modle.layers=3"], ["'modle'", "did you mean 'model'"]),
        (["--config.model.head_dim.x=3"], ["model.head_dim.x"]),
        (["--config.model=3"], ["model is a block", "model.layers"]),
        (["--config.layers=3"], ["layers is a block"]),
        (["--config.model.layers=2.5"], ["model.layers='2.5'", "int", "2"]),
        (["--config.model.layers=None"], ["model.layers='None'", "int"]),
        (["--config.model.layers=True"], ["model.layers='True'", "int"]),
        (["--config.model.kv_heads=two"], ["model.kv_heads='two'", "int"]),
        (["--config.model.tied=yes"], ["model.tied='yes'", "bool"]),
        (["--config.train.steps="], ["train.steps=''", "int"]),
        (["--config.train.steps"], ["--config.train.steps needs a value"]),
        (["--config.train.steps", "--workdir", "x"], ["--config.train.steps needs a value"]),
        (["config.train.steps=3"], ["config.train.steps=3", "two dashes"]),
        (["leftover"], ["'leftover'", "--workdir"]),
        (["--workdr=x"], ["--workdr=x", "did you mean '--workdir'"]),
        (["--config.scale=ful"], ["config.scale='ful'", "did you mean 'full'", "rehearsal"]),
        (["--config.pattern=rin"], ["config.pattern", "'rin'", "did you mean 'ring'", "blockwise"]),
        (["--config.pattern="], ["config.pattern=()", "ring"]),
        (["--config.posenc=rop"], ["config.posenc='rop'", "did you mean 'rope'", "alibi"]),
        (["--config.ffn=gatd"], ["config.ffn='gatd'", "did you mean 'gated'", "dense"]),
        (["--config.data.source=copi"], ["data.source='copi'", "did you mean 'copy'", "passkey"]),
        (["--config.data.source=tfds"], ["data.source='tfds'", "tfds:<name>"]),
        (["--config.mixers.ulysses.window=(9,0)"], ["--config.mixers.ulysses.window", "no 'ulysses'"]),
        (["--config.datasets.copy.symbols=9"], ["--config.datasets.copy.symbols", "no 'copy'"]),
        (["--config.data.packing=concta"], ["data.packing='concta'", "did you mean 'concat'"]),
        (["--config.ffns.gated.activation=silo"], ["ffns.gated.activation='silo'", "did you mean 'silu'"]),
        (["--config.posencs.rope.scaling=llama"], ["posencs.rope.scaling='llama'", "did you mean 'llama3'"]),
        (["--config.posencs.rope.fraction=0.01"], ["posencs.rope.fraction=0.01"]),
        (["--config.optimizer.name=adam"], ["optimizer.name='adam'", "did you mean 'adamw'", "muon"]),
        (["--config.optimizer.schedule=cosin"], ["optimizer.schedule='cosin'", "did you mean 'cosine'", "wsd"]),
        (["--config.sequence.layout=zig"], ["sequence.layout='zig'", "did you mean 'zigzag'", "striped"]),
        (["--config.name="], ["name=''", "letters"]),
        (["--config.name=../up"], ["name='../up'", "letters"]),
        (["--config.block.remat=mini"], ["block.remat='mini'", "did you mean 'minimal'"]),
        (["--config.track.wandb=of"], ["track.wandb='of'", "offline"]),
        (["--config.model.dtype=bfloat"], ["model.dtype='bfloat'", "did you mean 'bfloat16'"]),
        (["--config.require.attention=chunkd"], ["require.attention='chunkd'", "did you mean 'chunked'"]),
        (["--config.require.atention=chunked"], ["require.atention", "did you mean 'require.attention'"]),
        (["--config.mixers.ring.window=4095"], ["window=(4095,)", "(left, right)"]),
        (["--config.mixers.ring.window=(4,0,0)"], ["window=(4, 0, 0)", "(left, right)"]),
        (["--config.mixers.ring.window=(-4,0)"], ["window=(-4, 0)", ">= 0"]),
        (["--config.mixers.ring.sink_tokens=-1"], ["sink_tokens=-1"]),
        (["--config.model.kv_heads=0"], ["model.kv_heads=0", "at least 1"]),
        (["--config.block.token_chunk=-1"], ["block.token_chunk=-1", "at least 0"]),
        (["--config.ffns.gated.width=-8"], ["feed-forward width -8", "at least 1"]),
        (["--config.optimizer.final_fraction=2"], ["optimizer.final_fraction=2.0", "at most 1"]),
        (["--config.checkpoint.every=-1"], ["checkpoint.every=-1", "at least 0"]),
        (["--config.model.heads=3"], ["model.dim=64", "model.heads=3", "head_dim"]),
        (["--config.model.kv_heads=3"], ["model.heads=4", "model.kv_heads=3"]),
        (["--config.model.layers=1", "--config.pattern=ring,full"], ["config.pattern has 2", "model.layers=1"]),
        (["--config.train.batch=3", "--config.train.accumulate=2"], ["train.batch=3", "train.accumulate=2"]),
        (["--config.sequence.length=2_147_483_648"], ["sequence.length=2147483648", "at most 1073741824"]),
        (["--config.optimizer.beta1=1"], ["optimizer.beta1=1.0", "at least 0 and below 1"]),
        (["--config.optimizer.beta2=1"], ["optimizer.beta2=1.0", "at least 0 and below 1"]),
        (["--config.loss.label_smoothing=1"], ["loss.label_smoothing=1.0", "below 1"]),
        (["--config.model.norm_eps=0"], ["model.norm_eps=0.0", "above 0"]),
        (["--config.posencs.rope.theta=0"], ["posencs.rope.theta=0.0", "above 0"]),
        (["--config.posencs.rope.theta=-1"], ["posencs.rope.theta=-1.0", "above 0"]),
        (["--config.optimizer.learning_rate=0"], ["optimizer.learning_rate=0.0", "above 0"]),
        (["--config.optimizer.learning_rate=1e999"], ["optimizer.learning_rate=inf", "above 0 and finite"]),
        (["--config.optimizer.eps=1e999"], ["optimizer.eps=inf", "at least 0 and finite"]),
        (["--config.model.logit_softcap=0"], ["model.logit_softcap=0.0", "above 0"]),
        (["--config.model.heads=0"], ["model.heads=0", "at least 1"]),
        (
            ["--config.mixers.ring.implementation=chunkd"],
            ["implementation='chunkd'", "did you mean 'chunked'", "auto, reference"],
        ),
        (
            ["--config.pattern=mamba", "--config.mixers.mamba.conv_implementation=chunkd"],
            ["conv_implementation='chunkd'", "did you mean 'chunked'", "auto, reference"],
        ),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_that_names_field_value_and_choices(config_file, mistake, arguments, parts):
    says(mistake("--config", config_file(), *arguments), *parts)


@pytest.mark.parametrize(
    "arguments,parts",
    [
        ([], ["--config"]),
        (["--config"], ["--config"]),
        (["--config", "configs/tinny.py"], ["configs/tinny.py", "did you mean 'configs/tiny.py'", "configs/ring_1m.py"]),
        (["--config", "nowhere/x.py"], ["nowhere/x.py", "configs/tiny.py"]),
        (["--config", "configs/llama.py"], ["configs/llama.py", "FILE:arg"]),
        (["--config", "configs/llama.py:9b"], ["'9b'", "8b", "70b"]),
        (["--config", "configs/tiny.py:3"], ["configs/tiny.py:3", "no argument"]),
    ],
)
def test_a_missing_file_or_argument_is_one_line(mistake, monkeypatch, arguments, parts):
    monkeypatch.chdir(ROOT)
    says(mistake(*arguments), *parts)


# ---- mistakes in a config file


@pytest.mark.parametrize(
    "line,parts",
    [
        ("config.model.layer = 3", ["mine.py:10", "'layer'", "did you mean 'layers'", "heads"]),
        ("config.model.update(layer=3)", ["mine.py:10", "'layer'", "did you mean 'layers'"]),
        ("config.modle.layers = 3", ["mine.py:10", "'modle'", "did you mean 'model'"]),
        ("config.model.layers = '3'", ["mine.py:10", "'layers'", "3", "int"]),
        ("config.model.layers = 2.5", ["mine.py:10", "'layers'", "2.5", "int"]),
        ("config.mixers.ring.window = 4096", ["mine.py:10", "'window'", "4096", "tuple"]),
        ("config.model.layers = None", ["model.layers=None", "int"]),
        ("config.model.layers = True", ["model.layers=True", "int"]),
        ("config.model.kv_heads = True", ["model.kv_heads=True", "int"]),
        ("config.optimizer.learning_rate = '1e-3'", ["mine.py:10", "'learning_rate'", "1e-3", "float"]),
        ("config.name = None", ["config.name=None", "str"]),
        ("config.scale = None", ["config.scale=None", "rehearsal"]),
        ("config.posencs.rope.theta = None", ["posencs.rope.theta=None", "float"]),
        ("config.pattern = (3,)", ["config.pattern", "3", "ring"]),
        ("config.model = ml_collections.ConfigDict({'layers': 2})", ["model.dim is missing"]),
        ("with config.unlocked(): config.modle = 3", ["config field='modle'", "did you mean 'model'"]),
        ("with config.unlocked(): config.model.layer = 3", ["model field='layer'", "did you mean 'layers'"]),
        ("with config.unlocked(): config.mixers.rin = {}", ["mixers field='rin'", "did you mean 'ring'"]),
        ("surely_not_defined", ["mine.py:10", "NameError", "surely_not_defined"]),
        ("import surely_not_there", ["mine.py:10", "surely_not_there"]),
        ("config.model.layers = = 3", ["mine.py:10", "invalid syntax"]),
        ("return None", ["mine.py", "NoneType", "ConfigDict"]),
    ],
)
def test_a_mistake_in_a_config_file_is_one_line_with_its_place_or_field(config_file, mistake, line, parts):
    says(mistake("--config", config_file(line)), *parts)


def test_a_file_without_get_config_is_one_line(mistake, tmp_path):
    file = tmp_path / "empty.py"
    file.write_text("")
    says(mistake("--config", str(file)), "empty.py", "get_config()")


def test_a_failure_of_ours_inside_a_config_file_is_not_called_a_mistake(config_file, monkeypatch):
    def broken():
        raise TypeError("ours")

    monkeypatch.setattr("lcx.config.base", broken)
    with pytest.raises(TypeError, match="ours"):
        experiment.load(config_file(), {})


def test_a_mistake_ends_the_real_command_with_one_line_and_status_2():
    arguments = ["--config", "configs/tiny.py", "--config.optimizer.name=adam"]
    done = subprocess.run([sys.executable, "-m", "lcx.train", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: optimizer.name='adam' is not known; did you mean 'adamw'"), done.stderr
