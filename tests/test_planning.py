"""What a run needs, from the compiler alone: for devices that are here, and for pods that are not."""

import importlib.util
import json
import pathlib

import jax
import pytest

from lcx import experiment
from lcx.mesh import make_mesh
from lcx.planning.memory import compiled_bytes
from lcx.planning.topologies import topology_mesh
from lcx.planning.training import compile_for, train_step_memory
from lcx.registry import UserError
from lcx.train_loop.loop import Run
from tests.experiments import small

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
LLAMA = f"{CONFIGS}/llama.py"
GIB = 2**30
# What the compiler lets a program have of a chip's 16 and 96 GiB.
V5E_MEMORY, V5P_MEMORY = 15.75 * GIB, 95.73 * GIB

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="NOT CHECKED: compiling for TPUs needs pip install 'lcx[plan]' (libtpu)"
)


def test_an_unknown_target_names_the_nearest():
    with pytest.raises(UserError, match="target='v5e-265' is not known; did you mean 'v5e-256'"):
        topology_mesh("v5e-265", seq=-1)


def test_without_libtpu_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"target='v5e-256' needs libtpu.*pip install 'lcx\[plan\]'"):
        topology_mesh("v5e-256", seq=-1)


def test_an_experiment_can_be_planned_for_more_devices_than_there_are():
    e = experiment.load(f"{LLAMA}:7b", {"scale": "full"}, devices=256)
    assert e.mesh_sizes == dict(data=1, fsdp=1, seq=256, tensor=1) and e.sequence.length == 2**20
    with pytest.raises(UserError, match="needs 256 devices and there are 96"):
        experiment.load(f"{LLAMA}:7b", {"scale": "full", "mesh.seq": "256"}, devices=96)


def test_the_plan_is_what_the_run_compiles(tmp_path):
    """Bytes planned from shapes alone against those of the step that then runs."""
    fields = dict(mesh__fsdp=2, mesh__seq=2, train__batch=2, train__steps=1, pattern=("ring",), model__vocab=256)
    e = small(**fields)
    Run(e, tmp_path).train()
    ran = json.loads((tmp_path / "run.json").read_text())["compiled_step_bytes"]
    assert train_step_memory(e, make_mesh(**e.mesh_sizes)) == ran
    assert ran["peak"] >= ran["arguments"] + ran["temporary"] and ran["outputs"] < ran["arguments"]


def test_a_plan_needs_the_vocabulary():
    with pytest.raises(UserError, match="model.vocab=None"):
        train_step_memory(small(), make_mesh())


def test_the_state_is_taken_over_and_spread():
    """Donated: the new state lies where the old one did. Spread over (fsdp, seq): a device holds its share of the matrices."""
    fields = dict(pattern=("ring",), model__vocab=256, model__dim=128, model__layers=4, train__batch=4)
    arguments = {}
    for devices in (1, 4):
        e = small(mesh__fsdp=devices, **fields)
        found = train_step_memory(e, make_mesh(**e.mesh_sizes))
        assert found["peak"] < found["arguments"] + found["temporary"] + 0.1 * found["outputs"]
        arguments[devices] = found["arguments"]
    assert arguments[4] < 0.3 * arguments[1]


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("length", [2**20, 2**22])
def test_llama_7b_at_a_million_tokens_and_more_fits_a_v5e_pod(capsys, length):
    """The whole train step of the published 7B model, batch 1, 256 chips of 16 GiB. Compiled, not run."""
    e = experiment.load(f"{LLAMA}:7b", {"scale": "full", "sequence.length": str(length)}, devices=256)
    # The suite asks for "highest" to compare numbers; a run does not.
    with jax.default_matmul_precision("default"):
        found = compiled_bytes(compile_for(e, topology_mesh("v5e-256", **e.mesh_sizes)))
    with capsys.disabled():
        print(f"\nllama:7b, {length:,} tokens, v5e-256, bytes a device:", json.dumps(found))
    # fp32 parameters and two moments, each over all 256 devices, and a batch that is nothing beside them.
    assert found["arguments"] == pytest.approx(3 * 4 * 6_738_415_616 / 256, rel=0.02)
    assert found["peak"] < V5E_MEMORY


@pytest.mark.slow
@needs_libtpu
def test_longnet_on_a_billion_tokens_fits_a_slice_of_v5p(capsys):
    """The whole train step of `longnet_1b` over 1,024 chips; its header has the figure. Compiled, not run."""
    e = experiment.load(f"{CONFIGS}/longnet_1b.py", {"scale": "full", "model.vocab": "256"}, devices=1024)
    assert e.sequence.length == 2**30
    with jax.default_matmul_precision("default"):
        found = compiled_bytes(compile_for(e, topology_mesh("v5p:8x8x16", **e.mesh_sizes)))
    with capsys.disabled():
        print("\nlongnet_1b, 1,073,741,824 tokens, v5p:8x8x16, bytes a device:", json.dumps(found))
    assert found["peak"] < V5P_MEMORY
