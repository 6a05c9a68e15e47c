"""Configs: from a file and a command line to one typed, checked, frozen experiment.

A config file defines `get_config()` (or `get_config(arg)` for `--config FILE:arg`) and returns the ConfigDict of
`configs/base.py` with its differences. Order of precedence: base < experiment < rehearsal < command line.
"""

import ast
import dataclasses
import importlib.util
import inspect
import math
import pathlib
import re
import traceback
import types
import typing
from collections.abc import Iterable
from typing import Any

import ml_collections
from ml_collections.config_dict import placeholder

from lcx import block, mesh, model, registry
from lcx.data import DATASETS
from lcx.data.config import DataConfig
from lcx.ffn import FFNS
from lcx.mixers import MIXERS
from lcx.posenc import POSENCS
from lcx.registry import UserError
from lcx.train_loop import optimizer, settings
from pallas_kernels import KERNELS

BLOCKS: dict[str, type] = {
    "mesh": mesh.Config,
    "sequence": settings.SequenceConfig,
    "model": model.Config,
    "block": block.Config,
    "loss": model.LossConfig,
    "data": DataConfig,
    "optimizer": optimizer.Config,
    "train": settings.TrainConfig,
    "evaluate": settings.EvaluateConfig,
    "checkpoint": settings.CheckpointConfig,
    "track": settings.TrackConfig,
}
TABLES = {"mixers": MIXERS, "posencs": POSENCS, "ffns": FFNS, "datasets": DATASETS}
SCALES = ("auto", "full", "rehearsal")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The fields at the top of a config.

    Attributes:
      name: of the experiment; names the default workdir.
      scale: auto (rehearse on a host without accelerators), full or rehearsal.
      seed: of the parameters; `data.seed` orders the data.
      pattern: layer kinds, repeated over the layers. A mixer's name is a kind by default.
      posenc: position encoding of layers that do not say otherwise.
      ffn: feed-forward of layers that do not say otherwise.
      init_from: a directory of safetensors of the Llama family to start from; empty for random weights.
    """

    name: str = "base"
    scale: str = "auto"
    seed: int = 0
    pattern: tuple[str, ...] = ("ring",)
    posenc: str = "rope"
    ffn: str = "gated"
    init_from: str = ""


def optional(annotation: Any) -> tuple[type, bool]:
    """The plain type of an annotation, and whether None is allowed: `int | None` -> (int, True)."""
    arms = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    plain = [arm for arm in arms if arm is not type(None)]
    return typing.get_origin(plain[0]) or plain[0], len(plain) < len(arms)


def config_block(config_class: type) -> ml_collections.ConfigDict:
    """The ConfigDict of a `Config` dataclass: same fields, same defaults, same types."""
    hints = typing.get_type_hints(config_class)
    fields = {}
    for name, default in registry.config_fields(config_class).items():
        kind, may_be_none = optional(hints[name])
        fields[name] = placeholder(kind) if may_be_none else default
        if may_be_none and default is not None:
            fields[name].set(default)
    return ml_collections.ConfigDict(fields)


def base() -> ml_collections.ConfigDict:
    """The config of which every experiment states the differences; nothing here is written twice."""
    config = config_block(RunConfig)
    for name, config_class in BLOCKS.items():
        config[name] = config_block(config_class)
    for name, table in TABLES.items():
        config[name] = ml_collections.ConfigDict({part: config_block(part_class(table, part).Config) for part in table})
    config.require = ml_collections.ConfigDict({op: "" for op in KERNELS})
    config.layers = ml_collections.ConfigDict()
    config.rehearsal = ml_collections.ConfigDict()
    config.lock()
    # A config file names its own layer kinds, and any field, in these two; the loader checks them.
    config.layers.unlock()
    config.rehearsal.unlock()
    return config


def part_class(table: dict[str, str], name: str, field: str = "") -> Any:
    """The class or module that a table calls `name`."""
    return registry.load(table, name, field=field or name)


def load_file(path: str) -> ml_collections.ConfigDict:
    """The config that `FILE` or `FILE:arg` returns.

    Raises:
      UserError: no such file, no get_config, a wrong argument, or a field that does not exist or has another type.
    """
    name, _, argument = path.partition(":")
    file = pathlib.Path(name)
    if not file.is_file():
        others = file.parent.glob("*.py") if file.parent.is_dir() else ()
        beside = sorted(str(p) for p in others if "def get_config" in p.read_text(errors="replace"))
        raise registry.unknown("--config", name, beside or ["a Python file such as configs/tiny.py"])
    if file.suffix != ".py":
        raise UserError(f"--config={name} is no Python file (.py) with get_config(), such as configs/tiny.py")
    spec = importlib.util.spec_from_file_location(f"lcx_config_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError(f"--config={name}: the file defines no get_config()")
        takes_argument = bool(inspect.signature(module.get_config).parameters)
        if bool(argument) != takes_argument:
            wanted = "needs an argument, as in FILE:arg" if takes_argument else "takes no argument"
            raise UserError(f"--config={path}: get_config() {wanted}")
        config = module.get_config(argument) if argument else module.get_config()
    except UserError:
        raise
    except Exception as error:
        if (mistake := _mistake(error, file)) is None:
            raise
        raise mistake from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"--config={name}: get_config() returned {type(config).__name__}, not a ConfigDict")
    check_blocks(config)
    return config


def check_blocks(config: ml_collections.ConfigDict) -> None:
    """Raises UserError unless a config has the blocks of `base`, each as a block."""
    top = [field.name for field in dataclasses.fields(RunConfig)]
    blocks = [*BLOCKS, *TABLES, "require", "layers", "rehearsal"]
    check_fields(config, [*top, *blocks], "config")
    for name in blocks:
        if not isinstance(config[name], ml_collections.ConfigDict):
            raise UserError(f"config.{name}={config[name]!r} must be a block; change fields of it rather than replace it")


def _mistake(error: Exception, file: pathlib.Path) -> UserError | None:
    """One line for what a config file, or a ConfigDict that it used, raised; None for a failure elsewhere, which is ours."""
    if isinstance(error, SyntaxError) and error.filename in (str(file), None):
        return UserError(f"{file}:{error.lineno or 1}: {error.msg}")
    frames = [(f, f.f_code.co_filename, line) for f, line in traceback.walk_tb(error.__traceback__)]
    innermost, last = [(f, name) for f, name, _ in frames if not name.startswith("<frozen ")][-1]
    owner, lines = innermost.f_locals.get("self"), [line for _, name, line in frames if name == str(file)]
    if not lines or not (last == str(file) or isinstance(owner, ml_collections.ConfigDict)):
        return None
    text = " ".join(str(error.args[0] if error.args else error).split())
    missing = re.match(r"\W*(?:Key\W+)?(\w+)", text) if isinstance(error, (AttributeError, KeyError)) else None
    if missing and isinstance(owner, ml_collections.ConfigDict):
        return registry.unknown(f"{file}:{lines[-1]}: config field", missing[1], owner)
    return UserError(f"{file}:{lines[-1]}: {type(error).__name__}: {text}")


def declared(path: str) -> tuple[type, bool] | None:
    """The type of a field and whether None is allowed, from the dataclass that declares it; None for an open block."""
    names = path.split(".")
    if len(names) == 1:
        owner = RunConfig
    elif names[0] in BLOCKS and len(names) == 2:
        owner = BLOCKS[names[0]]
    elif names[0] in TABLES and len(names) == 3:
        owner = part_class(TABLES[names[0]], names[1]).Config
    else:
        return None
    return optional(typing.get_type_hints(owner)[names[-1]])


def assign(config: ml_collections.ConfigDict, path: str, value: Any, *, origin: str) -> None:
    """Sets `a.b.c` to a value, which is parsed when it is text and the field is not.

    Raises:
      UserError: the field does not exist or has another type.
    """
    *parents, last = path.split(".")
    node = config
    for depth, name in enumerate(parents):
        if not isinstance(node, ml_collections.ConfigDict) or name not in node:
            raise registry.unknown(f"{origin}: config field", ".".join(parents[: depth + 1]), _siblings(node, parents[:depth]))
        node = node[name]
    if not isinstance(node, ml_collections.ConfigDict) or last not in node:
        raise registry.unknown(f"{origin}: config field", path, _siblings(node, parents))
    if isinstance(node[last], ml_collections.ConfigDict):
        inside = ", ".join(_siblings(node[last], path.split("."))) or "(none; a config file defines them)"
        raise UserError(f"{origin}: {path} is a block; set one of {inside}")
    kind, none_allowed = declared(path) or (node.get_type(last), False)
    parsed = parse(value, kind) if isinstance(value, str) and kind is not str else value
    if none_allowed and parsed in (None, "None", "none"):
        node[last] = None
        return
    if not fits(parsed, kind):
        raise UserError(f"{origin}: {path}={value!r} is not of type {kind.__name__} (now {node[last]!r})")
    node[last] = float(parsed) if kind is float else parsed


def _siblings(node: Any, parents: list[str]) -> list[str]:
    return [".".join([*parents, name]) for name in node] if isinstance(node, ml_collections.ConfigDict) else []


def parse(text: str, kind: type) -> Any:
    """A value from the command line: Python literals; a bare word or comma list for tuples; true/false."""
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        value = ast.literal_eval(re.sub(r"\binf\b", "1e999", text))
    except (ValueError, SyntaxError):
        value = tuple(part.strip() for part in text.split(",") if part.strip()) if kind is tuple else text
    if kind is tuple and value is not None and not isinstance(value, tuple):
        value = tuple(value) if isinstance(value, list) else (value,)
    return value


def fits(value: Any, kind: type) -> bool:
    """Whether a value is of a field's type; an int fits a float, a bool fits no number."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float)) if kind is float else isinstance(value, kind)


def check_fields(found: Iterable[str], declared_names: Iterable[str], field: str) -> None:
    """Raises UserError unless a block has the declared fields, all of them and no others."""
    found, declared_names = set(found), sorted(declared_names)
    for name in sorted(found.difference(declared_names)):
        raise registry.unknown(f"{field} field", name, declared_names)
    for name in declared_names:
        if name not in found:
            raise UserError(f"{field}.{name} is missing; change fields of the block rather than replace it")


def typed(config_class: type, values: Any, field: str) -> Any:
    """The typed config of a block.

    Raises:
      UserError: a value of another type than the dataclass declares (a config file may have set None or True on an int), a
        field that it does not declare or one that is missing (a config file may have replaced or unlocked a block).
    """
    values, hints = dict(values), typing.get_type_hints(config_class)
    check_fields(values, hints, field)
    for name, hint in hints.items():
        kind, none_allowed = optional(hint)
        value = values[name]
        if value is None and none_allowed:
            continue
        if kind is tuple and isinstance(value, list):
            value = values[name] = tuple(value)
        if value is None or not fits(value, kind):
            raise UserError(f"{field}.{name}={value!r} is not of type {kind.__name__}")
        # A part's numbers; those of the run's own blocks have ranges (`lcx.ranges`).
        if "." in field and kind is float and not math.isfinite(value):
            raise UserError(f"{field}.{name}={value!r} must be finite")
        values[name] = float(value) if kind is float else value
    return config_class(**values)
