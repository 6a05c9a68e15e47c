"""No dead knobs: every field of every config is read by code that runs, not merely by the checks.

The Config classes are watched while a run goes its way, from the data to the last checkpoint with steps that are traced and
not compiled, and while every part of every table is built and traced. A read counts when code of lcx or pallas_kernels makes
it; the constructors, comparisons and `asdict` of the dataclasses do not count, nor do checks: a field that is only validated
is dead.
"""

import contextlib
import dataclasses
import pathlib
import sys
import types
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx import config, registry
from lcx.data import CATALOGUES, build_source
from lcx.data.tokenizers import Ids
from lcx.experiment import sizes_of
from lcx.mesh import AXES
from lcx.mesh import Config as MeshConfig
from lcx.train_loop import loop, optimizer, settings
from lcx.train_loop.state import abstract_state, plan_model
from lcx.train_loop.step import make_eval_step, make_train_step
from tests.experiments import small

ROOT = pathlib.Path(__file__).parent.parent
SOURCES = (f"{ROOT}/lcx/", f"{ROOT}/pallas_kernels/")
CHECKS = {"check", "_check", "__post_init__", "_names"}

Reads = set[tuple[str, str]]


@contextlib.contextmanager
def watching(*classes: type) -> Iterator[set[str]]:
    """The fields of the classes (subclasses included) that code of the project reads inside the block."""
    names = {field.name for watched in classes for field in dataclasses.fields(watched)}
    reads: set[str] = set()

    def spy(self, name):
        if name in names and isinstance(self, classes):
            code = sys._getframe(1).f_code
            if code.co_filename.startswith(SOURCES) and not CHECKS.intersection(code.co_qualname.split(".")):
                reads.add(name)
        return object.__getattribute__(self, name)

    with pytest.MonkeyPatch.context() as patch:
        for watched in classes:
            patch.setattr(watched, "__getattribute__", spy, raising=False)
        yield reads


def unread(config_class: type, reads: set[str]) -> set[str]:
    return {field.name for field in dataclasses.fields(config_class)} - reads


# ---- the blocks of a run


@dataclasses.dataclass(frozen=True)
class TrainConfigWithADeadField(settings.TrainConfig):
    """The loop's config, and a field that nothing reads."""

    never_read: int = 0


class FakeWandb(types.ModuleType):
    """wandb without files, threads or network."""

    def __init__(self):
        super().__init__("wandb")
        self.Settings = dict
        self.init = lambda **options: types.SimpleNamespace(log=lambda *a, **k: None, finish=lambda: None)


def traced_only(function):
    """The function traced, and ones in place of what it would return: reads are watched without compiling anything."""

    def call(*args):
        return jax.tree.map(lambda shape: np.ones(shape.shape, shape.dtype), jax.eval_shape(function, *args))

    return call


def traced_steps(run: loop.Run, batch, held_out):
    """Stands in for `Run._compile`: steps that are traced; the training step leaves the state as it is."""
    state = abstract_state(run.optimizer, run.plan, run.mesh)
    metrics = traced_only(make_train_step(run.experiment, run.plan, run.optimizer, run.mesh))(state, batch)[1]
    evaluation = traced_only(make_eval_step(run.experiment, run.plan, run.mesh))
    return lambda state, batch: (state, metrics | {"bad_in_row": np.int32(0)}), evaluation


@pytest.fixture(scope="module")
def block_reads(tmp_path_factory):
    """block -> (its class, its fields that were read) while a run went its way and every optimizer and schedule was built."""
    folder = tmp_path_factory.mktemp("dead_fields")
    (folder / "texts").mkdir()
    for i in range(12):
        (folder / "texts" / f"{i}.txt").write_text("the ring turns and the blocks pass by " * (1 + i % 3))
    fields = dict(
        pattern=("blockwise",),
        model__layers=1,
        model__logit_softcap=30.0,
        sequence__length=16,
        posenc="none",
        ffn="dense",
        train__steps=2,
        train__batch=1,
        evaluate__every=1,
        evaluate__batches=1,
        checkpoint__every=1,
        data__source="text_folder",
        data__cache_dir=str(folder / "cache"),
        data__held_out_fraction=0.3,
        track__wandb="offline",
    )
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setitem(sys.modules, "wandb", FakeWandb())
        patch.setitem(config.BLOCKS, "train", TrainConfigWithADeadField)
        classes = {**config.BLOCKS, "config": config.RunConfig}
        reads = {name: stack.enter_context(watching(watched)) for name, watched in classes.items() if name != "mesh"}
        e = small(**fields, **{"datasets.text_folder.path": str(folder / "texts")})
        patch.setattr(loop.Run, "_compile", traced_steps)
        # Writing every field into a checkpoint's identity is not using it.
        patch.setattr(loop, "identity", lambda experiment: {"values": {}, "defaults": {}})
        run = loop.Run(e, folder / "run")
        run.train()
        for name in optimizer.OPTIMIZERS:
            optimizer.build(dataclasses.replace(e.optimizer, name=name), 10, run.plan.infos)
        for schedule in optimizer.SCHEDULES:
            optimizer.learning_rate(dataclasses.replace(e.optimizer, schedule=schedule), 10)
    return {name: (classes[name], found) for name, found in reads.items()}


@pytest.mark.parametrize("block", [*(name for name in config.BLOCKS if name != "mesh"), "config"])
def test_every_field_of_a_block_is_read(block_reads, block):
    assert unread(*block_reads[block]) - {"never_read"} == set()


def test_a_field_that_nothing_reads_is_found(block_reads):
    assert unread(*block_reads["train"]) == {"never_read"}


def test_a_field_that_is_only_validated_is_found():
    """`model.layers` and the like are read by `check` as well; that alone must not count."""
    with watching(settings.CheckpointConfig, settings.EvaluateConfig) as reads:
        small()
    assert not reads


def test_the_fields_of_the_mesh_are_its_axes():
    """They are passed on by name, as a dict, so they are compared rather than watched."""
    assert tuple(field.name for field in dataclasses.fields(MeshConfig)) == AXES


# ---- mixers, position encodings, feed-forwards: built and traced with every switch on

SWITCHES = {
    "mixers": dict(window=(4, 0), sink_tokens=1, sink_logits=True, softcap=5.0, qk_norm=True, ulysses_degree=1),
    "posencs": dict(scaling="llama3", interleaved=True),
    "ffns": {},
}
CHOICE = {"mixers": "pattern", "posencs": "posenc", "ffns": "ffn"}


def trace_step(**overrides) -> None:
    """Resolves, plans and traces a training step; compiles and runs nothing."""
    e = small(**(dict(pattern=("ring",), model__layers=1, sequence__length=16, train__batch=1) | overrides))
    plan = plan_model(e, sizes_of(e, 32))
    run_mesh = loop.make_mesh(**e.mesh_sizes)
    with jax.set_mesh(run_mesh):
        built = optimizer.build(e.optimizer, e.train.steps, plan.infos)
        zero = jax.ShapeDtypeStruct((), jnp.int32)
        state = loop.TrainState(plan.shapes, jax.eval_shape(built.init, plan.shapes), zero, zero, zero)
        tokens = jax.ShapeDtypeStruct((1, 16), jnp.int32)
        names = ("tokens_BS", "labels_BS", "positions_BS", "segments_BS")
        batch = dict.fromkeys(names, tokens) | {"weights_BS": jax.ShapeDtypeStruct((1, 16), jnp.float32)}
        jax.eval_shape(make_train_step(e, plan, built, run_mesh), state, batch)


def reads_of_part(table: str, name: str) -> tuple[type, set[str]]:
    config_class = registry.load(config.TABLES[table], name, field=table).Config
    names = {field.name for field in dataclasses.fields(config_class)}
    switches = {f"{table}.{name}.{field}": value for field, value in SWITCHES[table].items() if field in names}
    with watching(config_class) as reads:
        trace_step(**{CHOICE[table]: (name,) if table == "mixers" else name}, **switches)
    return config_class, reads


@pytest.mark.parametrize("table,name", [(table, name) for table in CHOICE for name in config.TABLES[table]])
def test_every_field_of_a_part_is_read(table, name):
    assert unread(*reads_of_part(table, name)) == set()


def test_a_part_that_ignores_a_field_is_found(monkeypatch):
    gated = registry.load(config.TABLES["ffns"], "gated", field="ffn")
    monkeypatch.setattr(gated, "inner_width", staticmethod(lambda config, D: 4 * D))
    assert unread(*reads_of_part("ffns", "gated")) == {"width"}


# ---- data sources and tasks: built, identified and read


@pytest.fixture
def fake_catalogues(monkeypatch):
    """Packages `datasets` and `tensorflow_datasets` that hold one text."""
    rows = [{"text": "a text"}]
    hub = types.ModuleType("datasets")
    hub.load_dataset = lambda *_, **__: type("Rows", (list,), {"column_names": ["text"]})(rows)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    tfds = types.ModuleType("tensorflow_datasets")
    info = types.SimpleNamespace(full_name="fake/1.0.0", features={"text": None})
    source = lambda split: [{"text": b"a text"}]
    builder = types.SimpleNamespace(info=info, data_path=ROOT, as_data_source=source)
    tfds.builder, tfds.disable_progress_bar = lambda *_, **__: builder, lambda: None
    tfds.core = types.SimpleNamespace(DatasetNotFoundError=LookupError)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", tfds)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def options_of(name: str, folder: pathlib.Path) -> dict[str, object]:
    """What a source needs to be set before it can be read."""
    (folder / "a.txt").write_text("a text")
    np.arange(8, dtype=np.uint16).tofile(folder / "tokens.bin")
    return {
        "text_folder": {"path": str(folder)},
        "token_file": {"path": str(folder / "tokens.bin"), "document_end": 3},
    }.get(name, {})


@pytest.mark.parametrize("name", config.TABLES["datasets"])
def test_every_field_of_a_data_source_is_read(name, tmp_path, fake_catalogues):
    part = registry.load(config.TABLES["datasets"], name, field="data.source")
    with watching(part.Config) as reads:
        source = build_source(f"{name}:fake" if name in CATALOGUES else name, part.Config(**options_of(name, tmp_path)))
        if part.generated:
            rows = source.rows(seed=0, split="held_out", sequence_length=256, causal_labels=True)
            rows.slice(0, 0, 256)
        elif dataclasses.fields(part.Config):
            source.identity(tmp_path)
            assert len(list(source.documents(tmp_path))) >= 1
        if getattr(part, "holds_tokens", False):
            source.vocab_size(Ids())
    assert unread(part.Config, reads) == set()
