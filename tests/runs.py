"""A small corpus and runs over it. Fixtures of every session, so lcx is imported only in those that use them."""

import json
import pathlib

import numpy as np
import pytest


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of text files of uneven lengths."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for i in range(40):
        words = rng.choice(["ring", "block", "scan", "token", "mesh", "axis"], size=int(rng.integers(20, 90)))
        (folder / f"{i:02d}.txt").write_text(" ".join(words))
    return folder


PROGRAMS = {}


@pytest.fixture
def shared_programs(monkeypatch):
    """Runs of the same config share their compiled steps; test_processes.py compiles anew in every process."""
    from lcx.train_loop import fitting, loop

    def share(module, name):
        compile_step = getattr(module, name)

        def shared(experiment, *args):
            config = experiment.resolved | dict(seed=0)  # the step is given its parameters
            key = (name, experiment.block.remat, json.dumps(config, sort_keys=True))
            if key not in PROGRAMS:
                PROGRAMS[key] = compile_step(experiment, *args)
            return PROGRAMS[key]

        monkeypatch.setattr(module, name, shared)

    share(fitting, "compile_train_step")
    share(loop, "compile_eval_step")


@pytest.fixture
def run_of(corpus, tmp_path, shared_programs):
    """run_of(workdir name, **overrides) -> a Run over the corpus."""
    from lcx.train_loop import loop
    from tests.experiments import small

    def make(name="run", **overrides):
        fields = dict(
            pattern=("blockwise",),
            sequence__length=32,
            train__steps=8,
            train__batch=2,
            train__log_every=1,
            checkpoint__every=2,
            evaluate__every=3,
            evaluate__batches=2,
            optimizer__warmup_steps=2,
            data__source="text_folder",
            data__cache_dir=str(corpus.parent / "cache"),
            data__held_out_fraction=0.2,
        )
        extra = {"datasets.text_folder.path": str(corpus)}
        return loop.Run(small(**(fields | overrides), **extra), tmp_path / name)

    return make


def logged(workdir: pathlib.Path, key="loss"):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}
