"""Layer kinds of a config, and what has to fit together: mesh, mixer, layout, vocabulary."""

import types

import pytest

from lcx import experiment
from lcx.registry import UserError
from tests.command_line import says
from tests.experiments import small

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


def test_a_recurrence_alone_needs_no_heads(config_file):
    """Neither a width that heads divide nor a position encoding."""
    e = experiment.load(config_file("config.pattern = ('mamba',)\nconfig.posencs.rope.fraction = 0.01"), {"model.heads": "3"})
    assert e.pattern[0].posenc.__name__ == "NoPosition"


# ---- what has to fit together


def test_only_a_rehearsal_that_states_a_mesh_is_shrunk(config_file, mistake):
    """What the command line asks for is not changed."""
    file = config_file("config.sequence.length = 4096\nconfig.rehearsal = {'mesh': {'seq': 64}, 'sequence': {'length': 512}}")
    e = experiment.load(file, {"scale": "rehearsal"}, devices=8)
    assert e.mesh_sizes["seq"] == e.resolved["mesh"]["seq"] == 8
    says(mistake("--config", file, "--config.scale=rehearsal", "--config.mesh.seq=64"), "64")


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


def test_auto_layout_of_long_packed_rows_is_cyclic():
    layout = lambda **fields: small(mesh__seq=4, pattern=("ring",), **fields).layout
    assert layout(sequence__length=2**15) == "cyclic"
    assert layout(sequence__length=2**14) == layout(sequence__length=2**15, data__packing="stream") == "zigzag"
    assert layout(sequence__length=2**15, mixers__ring__window=(9, 0)) == "contiguous"
    assert layout(sequence__length=2**15, data__source="copy", model__vocab=64) == "zigzag"
    assert small(mesh__seq=3, mesh__fsdp=1, model__dim=48, pattern=("ring",), sequence__length=3 * 2**13).layout == "zigzag"
    with pytest.raises(UserError, match="'cyclic' cannot cut the 35 tokens of a device .* 'zigzag' takes"):
        small(mesh__seq=3, model__dim=48, pattern=("ring",), sequence__length=105, sequence__layout="cyclic")


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
