"""The committed experiments, at both scales and on any number of devices; the README's example; the Llama family's sizes."""

import importlib
import inspect
import math
import pathlib
import re

import jax
import pytest

from lcx import experiment
from lcx.data import DATASETS
from lcx.ffn import FFNS
from lcx.mixers import MIXERS
from lcx.parallel.layouts import LAYOUTS
from lcx.posenc import POSENCS
from lcx.train_loop.optimizer import OPTIMIZERS
from lcx.train_loop.state import plan_model

ROOT = pathlib.Path(__file__).parent.parent
DEVICES = {"bpt_256k": 1, "mst_1m": 8, "ring_1m": 64, "llama": 256, "longnet_1b": 1024}


def committed() -> list[str]:
    """FILE or FILE:arg of every committed experiment."""
    found = []
    for path in sorted((ROOT / "configs").glob("*.py")):
        module = importlib.import_module(f"configs.{path.stem}")
        if not hasattr(module, "get_config"):
            continue
        takes_argument = inspect.signature(module.get_config).parameters
        found += [f"{path}:{size}" for size in module.SIZES] if takes_argument else [str(path)]
    return found


def named(path: str) -> str:
    return pathlib.Path(path).name


@pytest.mark.parametrize("path", committed(), ids=named)
def test_every_committed_config_loads_at_full_scale_and_in_rehearsal(path, monkeypatch):
    count = DEVICES.get(pathlib.Path(path.partition(":")[0]).stem, 8)
    monkeypatch.setattr(jax, "device_count", lambda: count)
    full = experiment.load(path, {"scale": "full"})
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    auto = experiment.load(path, {})
    assert full.full_length == full.sequence.length == auto.full_length
    if full.full_length >= 2**17:
        assert auto.scale == "rehearsal"
        assert auto.sequence.length < 2**15 or auto.sequence.length == min(full.full_length, 2**20), "short, or of linear cost"
        assert {kind.mixer for kind in auto.pattern} == {kind.mixer for kind in full.pattern}


@pytest.mark.parametrize("devices", [1, 4, 8])
@pytest.mark.parametrize("path", [path for path in committed() if path.endswith(("256k.py", "_1m.py", "_1b.py"))], ids=named)
def test_every_rehearsal_loads_on_any_host(path, devices, monkeypatch):
    """The remedy that a run out of memory names: on accelerators too, whose number no config knows."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    rehearsal = experiment.load(path, {"scale": "rehearsal"})
    assert math.prod(rehearsal.mesh_sizes.values()) <= devices


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["bpt_256k", "mst_1m", "ring_1m", "tiny"])
def test_an_experiment_that_needs_no_pod_loads_on_one_host(name, devices):
    full = experiment.load(f"{ROOT}/configs/{name}.py", {"scale": "full"}, devices=devices)
    assert math.prod(full.mesh_sizes.values()) == devices


def test_the_example_of_the_readme_loads(tmp_path):
    section = (ROOT / "README.md").read_text().partition("## Your own experiment")[2].partition("\n## ")[0]
    (example,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    file = tmp_path / "my_hybrid.py"
    file.write_text(example)
    loaded = experiment.load(str(file), {}, devices=8)
    assert loaded.mesh_sizes == dict(data=1, fsdp=2, seq=1, tensor=4)
    assert [kind.name for kind in loaded.pattern] == ["mamba", "mamba", "local", "ring"]
    assert loaded.pattern[2].mixer_config.window == (4095, 0)


def test_the_readme_lists_every_part():
    """The names in its table of choices are those of the tables, no more and no fewer."""
    rows = dict(re.findall(r"^\| ([a-z -]+) \| .*? \| (.*) \|$", (ROOT / "README.md").read_text(), flags=re.MULTILINE))
    names = lambda row: {name.removesuffix(":NAME") for name in re.findall(r"`([\w:]+)`", rows[row])}
    tables = {"mixer": MIXERS, "position encoding": POSENCS, "feed-forward": FFNS, "data": DATASETS, "optimizer": OPTIMIZERS}
    for row, table in (tables | {"order of tokens": LAYOUTS}).items():
        assert names(row) == set(table), row


PUBLISHED = {
    "1b": 1_235_814_400,
    "3b": 3_212_749_824,
    "7b": 6_738_415_616,
    "8b": 8_030_261_248,
    "13b": 13_015_864_320,
    "30b": 32_528_943_616,
    "70b": 70_553_706_496,
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_llama_family_has_its_published_parameter_counts(size, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 256)
    e = experiment.load(f"{ROOT}/configs/llama.py:{size}", {"scale": "full"})
    plan = plan_model(e, experiment.sizes_of(e, e.model.vocab))
    assert plan.parameter_count == PUBLISHED[size]
    assert not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(plan.shapes))


def test_every_size_of_the_llama_family_is_counted():
    assert set(importlib.import_module("configs.llama").SIZES) == set(PUBLISHED)


def test_the_parameter_count_notices_one_wrong_width(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 256)
    e = experiment.load(f"{ROOT}/configs/llama.py:1b", {"scale": "full", "ffns.gated.width": "8064"})
    assert plan_model(e, experiment.sizes_of(e, e.model.vocab)).parameter_count != PUBLISHED["1b"]
