"""Configs: precedence, one line for every mistake, layer kinds, layouts."""

import pathlib
import subprocess
import sys
import types

import pytest

from lcx import command, experiment, train
from lcx.registry import UserError
from lcx.train_loop import loop

ROOT = pathlib.Path(__file__).parent.parent
BASE = "config = base.get_config()\nconfig.update(name='mine', scale='full')\nconfig.mesh.seq = 1\nconfig.model.dtype = 'float32'"


@pytest.fixture
def config_file(tmp_path):
    """config_file(lines) -> the path of a config file that runs them on the base config."""

    def write(lines="", start=BASE):
        body = "\n".join(f"    {line}" for line in f"{start}\n{lines}\nreturn config".splitlines())
        path = tmp_path / "mine.py"
        path.write_text(f"from configs import base\nimport ml_collections\n\n\ndef get_config():\n{body}\n")
        return str(path)

    return write


@pytest.fixture
def cli(monkeypatch, capsys):
    """cli(*arguments) -> (exit status, stderr, the experiment that would have run) of `python -m lcx.train`."""
    started = []

    class NoRun:
        def __init__(self, chosen, workdir):
            started.append(chosen)

        def train(self):
            return {"ending": "finished"}

    monkeypatch.setattr(loop, "Run", NoRun)
    monkeypatch.setattr(command, "prepare_platform", lambda: None)

    def call(*arguments):
        started.clear()
        monkeypatch.setattr(sys, "argv", ["lcx.train", *arguments])
        with pytest.raises(SystemExit) as ended:
            command.main(train.run)
        return ended.value.code, capsys.readouterr().err, started[0] if started else None

    return call


@pytest.fixture
def mistake(cli):
    """mistake(*arguments) -> the text after `error: `, when the status is 2 and nothing started."""

    def call(*arguments):
        status, err, ran = cli(*arguments)
        assert status == 2 and ran is None, (status, err)
        assert err.startswith("error: ") and "Traceback" not in err
        return err.removeprefix("error: ").removesuffix("\n")

    return call


def says(text, *parts):
    """The text is one line and holds every part."""
    assert "\n" not in text
    assert all(part in text for part in parts), (text, parts)


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


# ---- layer kinds


def test_a_layer_kind_of_the_config_carries_its_own_fields(config_file):
    lines = (
        "config.layers.local = dict(mixer='ring', window=4096, posenc='none', ffn='dense')\nconfig.pattern = ('local', 'ring')"
    )
    local, ring = experiment.load(config_file(lines), {}).pattern
    assert local.mixer_config.window == (4095, 0) and ring.mixer_config.window is None
    assert (local.posenc.__name__, local.ffn.__name__) == ("NoPosition", "Dense")
    assert (ring.posenc.__name__, ring.ffn.__name__) == ("Rope", "Gated")


@pytest.mark.parametrize(
    "kind,parts",
    [
        ("dict(mixer='ring', windw=4096)", ["layers.local field='windw'", "did you mean 'window'"]),
        ("dict(mixer='rin')", ["layers.local.mixer='rin'", "did you mean 'ring'"]),
        ("dict(window=4)", ["layers.local.mixer='local'", "ulysses"]),
        ("dict(mixer='ring', posenc='rop')", ["layers.local.posenc='rop'", "did you mean 'rope'"]),
        ("dict(mixer='ring', ffn='gatd')", ["layers.local.ffn='gatd'", "did you mean 'gated'"]),
        ("dict(mixer='ring', window=True)", ["layers.local.window=True", "tuple"]),
        ("dict(mixer='ring', sink_tokens=1.5)", ["layers.local.sink_tokens=1.5", "int"]),
        ("3", ["layers.local=3", "dict"]),
        ("dict(mixer='ring', window=0)", ["layers.local.window=0", "at least 1"]),
        ("dict(mixer='ring', window=(2**40, 0))", ["window=(1099511627776, 0)", "below 2^30"]),
        ("dict(mixer='ring', sink_tokens=4)", ["sink_tokens=4 without a window"]),
        ("dict(mixer='longnet', segments=(64,), dilations=(100_000_000,))", ["dilations=(100000000,) must hold a 1"]),
        ("dict(mixer='longnet', segments=(64, 64), dilations=(1, 65))", ["dilation 65 of segment 64", "at most 64"]),
        ("dict(mixer='mamba', conv=99_999_999)", ["conv=99999999", "lower it"]),
        ("dict(mixer='mamba', posenc='alibi')", ["layers.local.posenc='alibi'", "'mamba' takes no position encoding"]),
    ],
)
def test_a_mistake_in_a_layer_kind_names_its_field(config_file, mistake, kind, parts):
    says(mistake("--config", config_file(f"config.layers.local = {kind}\nconfig.pattern = ('local',)")), *parts)


def test_a_mistake_in_a_kind_that_the_pattern_leaves_out_is_found(config_file, mistake):
    says(mistake("--config", config_file("config.layers.local = dict(mixer='rng')")), "layers.local.mixer='rng'")


def test_only_a_rehearsal_that_states_a_mesh_is_shrunk(config_file, mistake):
    """What the command line asks for is not changed."""
    file = config_file("config.sequence.length = 4096\nconfig.rehearsal = {'mesh': {'seq': 64}, 'sequence': {'length': 512}}")
    e = experiment.load(file, {"scale": "rehearsal"}, devices=8)
    assert e.mesh_sizes["seq"] == e.resolved["mesh"]["seq"] == 8
    says(mistake("--config", file, "--config.scale=rehearsal", "--config.mesh.seq=64"), "64")


def test_a_recurrence_alone_needs_no_heads(config_file):
    """Neither a width that heads divide nor a position encoding."""
    e = experiment.load(config_file("config.pattern = ('mamba',)\nconfig.posencs.rope.fraction = 0.01"), {"model.heads": "3"})
    assert e.pattern[0].posenc.__name__ == "NoPosition"


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
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_that_names_field_value_and_choices(config_file, mistake, arguments, parts):
    says(mistake("--config", config_file(), *arguments), *parts)


@pytest.mark.parametrize(
    "arguments,parts",
    [
        (["mesh.seq=-1", "mesh.data=-1"], ["mesh.seq=-1", "only one axis"]),
        (["mesh.seq=0"], ["mesh.seq=0", "at least 1"]),
        (["mesh.seq=64"], ["64 devices", "there are 32"]),
        (["mesh.seq=3", "mesh.data=-1"], ["32 devices cannot be divided by 3"]),
        (["mesh.seq=4", "sequence.length=1020"], ["sequence.length=1020", "multiple of 8", "mesh.seq=4", "nearest is 1024"]),
        (["mesh.seq=4", "model.dim=66", "model.head_dim=16"], ["model.dim=66", "mesh.fsdp*mesh.seq=4"]),
        (["mesh.data=2", "train.batch=3"], ["train.batch=3", "mesh.data*mesh.fsdp=2"]),
        (["mesh.tensor=4", "model.heads=4", "model.kv_heads=2"], ["model.kv_heads=2", "mesh.tensor=4"]),
        (["mesh.tensor=2", "ffns.gated.width=129"], ["feed-forward width 129", "mesh.tensor=2"]),
        (["mesh.seq=2", "pattern=full"], ["mixer 'full'", "mesh.seq=1", "2", "'ring'"]),
        (["mesh.seq=2", "pattern=blockwise"], ["mixer 'blockwise'", "mesh.seq=1", "'ring'"]),
        (["pattern=full", "sequence.length=16385"], ["'full'", "16384", "sequence.length=16385", "'ring'"]),
        (["block.fuse_attention=True"], ["block.fuse_attention=True", "'ring'", "'blockwise'"]),
        (
            ["mesh.seq=8", "pattern=ulysses"],
            ["layer 'ulysses'", "model.heads=4", "mesh.seq=8", "groups that can: 1, 2, 4", "'ring'"],
        ),
        (["mesh.seq=4", "mesh.tensor=2", "pattern=ulysses"], ["model.heads=4", "mesh.tensor=2", "groups that can: 1, 2)"]),
        (
            ["mesh.seq=8", "pattern=ulysses_ring", "mixers.ulysses_ring.ulysses_degree=3"],
            ["ulysses_degree=3", "mesh.seq=8", "groups that can: 1, 2, 4"],
        ),
        (
            ["mesh.seq=8", "pattern=ulysses_ring", "mixers.ulysses_ring.ulysses_degree=8"],
            ["ulysses_degree=8", "model.heads=4", "groups that can: 1, 2, 4"],
        ),
    ],
)
def test_what_does_not_fit_the_mesh_or_the_mixer_is_one_line(config_file, mistake, arguments, parts):
    says(mistake("--config", config_file(), *(f"--config.{a}" for a in arguments)), *parts)


def test_several_problems_are_listed_together(config_file, mistake):
    found = mistake(
        "--config", config_file(), "--config.mesh.tensor=3", "--config.sequence.length=16385", "--config.pattern=full,ring"
    )
    first, *rest = found.splitlines()
    assert first == f"{len(rest)} problems in the config"
    for part in ("model.heads=4 does not divide over mesh.tensor=3", "sequence.length=16385", "feed-forward width 256"):
        assert any(part in line for line in rest), (part, rest)
    assert all(line.startswith("  ") for line in rest)


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


def test_auto_layout_is_what_most_entries_of_the_pattern_like_best(config_file):
    layout = lambda **options: experiment.load(config_file(), {n.replace("__", "."): v for n, v in options.items()}).layout
    assert layout(mesh__seq="1", pattern="ring") == "contiguous"
    assert layout(mesh__seq="4", pattern="ring") == "zigzag"
    assert layout(mesh__seq="4", model__layers="3", pattern="ring,mamba,mamba") == "contiguous"
    assert layout(mesh__seq="4", model__layers="3", pattern="ring,mamba,ring") == "zigzag"
    assert layout(mesh__seq="4", pattern="ring,mamba") == "contiguous", "as many: the order in which the data comes"


def test_a_vocabulary_that_does_not_fit_is_refused():
    e = types.SimpleNamespace(mesh_sizes={"tensor": 3})
    e.model = experiment.model.Config(vocab=256)
    with pytest.raises(UserError, match="model.vocab=256 is smaller than the tokenizer's 300"):
        experiment.sizes_of(e, 300)
    with pytest.raises(UserError, match="model.vocab=256 does not divide over mesh.tensor=3; 258 does"):
        experiment.sizes_of(e, 200)
