"""The import direction, read from the sources; and that every name in a table leads to a complete part."""

import ast
import dataclasses
import pathlib
import subprocess
import sys

import pytest

from lcx import registry
from lcx.config import TABLES
from lcx.parallel import STRATEGIES
from pallas_kernels import KERNELS

ROOT = pathlib.Path(__file__).parent.parent
FIRST_PARTY = ("lcx", "pallas_kernels", "configs", "launch", "experiments", "tests")

# A module may import modules of its own level and below. The longest prefix that matches decides.
LEVELS = {
    "lcx.registry": 0,
    "lcx.dims": 0,
    "lcx": 0,  # the package itself is empty
    "pallas_kernels": 0,
    "lcx.placement": 1,
    "lcx.mesh": 1,
    "lcx.command": 1,
    "lcx.folders": 1,
    "lcx.ranges": 1,
    "lcx.remat": 1,
    "lcx.initializers": 1,
    "lcx.wide_gradient": 1,
    "lcx.sharding": 2,
    "lcx.ops": 3,
    "lcx.parallel": 4,
    "lcx.context": 5,
    "lcx.embedding": 5,
    "lcx.data": 5,
    "lcx.mixers": 6,
    "lcx.posenc": 6,
    "lcx.ffn": 6,
    "lcx.block": 7,
    "lcx.model": 8,
    "lcx.train_loop.settings": 8,
    "lcx.train_loop.optimizer": 8,
    "lcx.planning": 8,
    "lcx.config": 9,
    "lcx.experiment": 10,
    "lcx.train_loop.state": 11,
    "lcx.pretrained": 12,
    "lcx.train_loop": 13,
    "lcx.planning.training": 14,
}
COMMANDS = 15  # every other module of lcx: python -m lcx.<verb>

# Packages that may import nothing of the project but these (and themselves).
ONLY = {
    # recurrence: what a kernel of a recurrence returns (`Affine`) and what marks mean are said there, in plain jnp.
    "pallas_kernels": (
        "lcx.dims",
        *(f"lcx.ops.{name}" for name in ("types", "visibility", "tiling", "recurrence", "varying")),
    ),
    "lcx.data": ("lcx.registry", "lcx.folders", "lcx.mesh", "lcx.command"),
    "configs": ("lcx.config", "lcx.registry"),
}
# Of pallas_kernels what benchmarks read: sizes, no kernels.
MEASURED = ("pallas_kernels.specs", "pallas_kernels.tiles")
# Imported when any config is loaded, so of packages outside the project only these, at module level.
LIGHT = ("lcx.mixers", "lcx.posenc", "lcx.ffn")
LIGHT_PACKAGES = ("jax", "flax", "numpy", *sys.stdlib_module_names)
OPTIONAL = (
    "matplotlib",
    "datasets",
    "tokenizers",
    "sentencepiece",
    "tensorboardX",
    "tokamax",
    "libtpu",
    "torch",
    "transformers",
    "tensorflow",
)


@dataclasses.dataclass(frozen=True)
class Import:
    """One import: the module or name that is asked for, its line, and whether importing the file runs it."""

    target: str
    line: int
    at_module_level: bool


def inside(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def level(module: str) -> int:
    found = [prefix for prefix in LEVELS if inside(module, prefix) and (prefix != "lcx" or module == "lcx")]
    return LEVELS[max(found, key=len)] if found else COMMANDS


def imports(source: str, module: str, is_package: bool = False) -> list[Import]:
    """Every import of a source file, relative ones resolved; `from lcx import block` counts as lcx.block."""
    tree, found = ast.parse(source), []
    lazy = {inner for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.Lambda)) for inner in ast.walk(node)}
    typing_only = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    lazy |= {inner for node in typing_only for inner in ast.walk(node)}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".") if is_package else module.split(".")[:-1]
            above = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            package = ".".join(filter(None, [above, node.module]))
            names = [f"{package}.{alias.name}" if is_module(f"{package}.{alias.name}") else package for alias in node.names]
        found += [Import(name, node.lineno, node not in lazy) for name in names]
    return found


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return (
        path.with_suffix(".py").is_file()
        or (path / "__init__.py").is_file()
        or name in LEVELS
        or name == "jax.experimental.pallas"
    )


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """What a file imports that it must not."""
    found = []
    for imported in imports(source, module, is_package):
        target = imported.target
        say = lambda why, t=target, line=imported.line: found.append(f"{module}:{line} imports {t}: {why}")
        if target.split(".")[0] in ("launch", "experiments", "tests") and not inside(module, target.split(".")[0]):
            say("nothing imports it")
        if inside(module, "lcx") and inside(target, "configs"):
            say("configs import lcx")
        measures = inside(module, "lcx.benchmarks") and target in MEASURED
        if inside(module, "lcx") and inside(target, "pallas_kernels") and target != "pallas_kernels" and not measures:
            say("a kernel is loaded by the dispatcher, by name")
        if inside(module, "lcx") and inside(target, "lcx") and level(target) > level(module):
            say(f"level {level(target)} from level {level(module)}")
        for package, allowed in ONLY.items():
            if inside(module, package) and target.split(".")[0] in FIRST_PARTY:
                if not inside(target, package) and not any(inside(target, name) for name in allowed):
                    say(f"{package} imports only {', '.join(allowed)}")
        if "pallas" in target.split(".") and inside(module, "lcx") and level(module) < COMMANDS:
            say("Pallas lives in pallas_kernels")
        if imported.at_module_level and target.split(".")[0] in OPTIONAL:
            say("an optional package, at module level")
        light = any(inside(module, package) for package in LIGHT)
        if light and imported.at_module_level and target.split(".")[0] not in (*LIGHT_PACKAGES, *FIRST_PARTY):
            say("imported with every config, so only jax, flax and numpy")
    return found


def files() -> list[pathlib.Path]:
    return [path for folder in ("lcx", "pallas_kernels", "configs", "launch") for path in sorted((ROOT / folder).rglob("*.py"))]


def module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_every_file_imports_only_what_stands_below_it():
    found = [v for path in files() for v in violations(path.read_text(), module_name(path), path.name == "__init__.py")]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "module,line",
    [
        ("lcx.ops.attention", "from lcx.parallel.ring import forward"),
        ("lcx.ops.attention", "from lcx import model"),
        ("lcx.ops.attention", "def f():\n    from lcx.model import Model"),
        ("lcx.ops.attention", "from ..parallel import ring"),
        ("lcx.ops.attention", "import jax.experimental.pallas as pl"),
        ("lcx.ops.attention", "from pallas_kernels.attention_tpu import forward"),
        ("lcx.parallel.ring", "from lcx.mixers import Caps"),
        ("lcx.mixers.mine", "from lcx.block import Block"),
        ("lcx.mixers.mine", "from jax.experimental import pallas"),
        ("lcx.mixers.mine", "import einops"),
        ("lcx.block", "from lcx.model import Model"),
        ("lcx.model", "from lcx.experiment import Experiment"),
        ("lcx.config", "from lcx.experiment import Experiment"),
        ("lcx.train_loop.optimizer", "from lcx.config import typed"),
        ("lcx.train_loop.state", "from lcx.train_loop.step import make_train_step"),
        ("lcx.pretrained", "from lcx.train_loop.loop import Run"),
        ("lcx.train_loop.step", "from lcx.planning.training import compile_for"),
        ("lcx.train_loop.step", "import lcx.train"),
        ("lcx.data.rows", "from lcx.context import SequenceContext"),
        ("lcx.data.rows", "import datasets"),
        ("lcx.train", "from experiments.recall import run"),
        ("lcx.train", "import launch.slurm"),
        ("lcx.benchmarks.tune", "from pallas_kernels import attention_tpu"),
        ("lcx.ops.attention", "from pallas_kernels import tiles"),
        ("lcx.train_loop.loop", "from lcx.benchmarks import timing"),
        ("lcx.config", "from configs import base"),
        ("pallas_kernels.attention_tpu", "from lcx.registry import UserError"),
        ("pallas_kernels.attention_tpu", "from lcx.ops import attention"),
        ("configs.mine", "from lcx.model import Config"),
    ],
)
def test_the_import_check_can_fail(module, line):
    assert len(violations(line, module)) >= 1


@pytest.mark.parametrize(
    "module,line",
    [
        ("lcx.mixers.mine", "from lcx.mixers.attention import Attention"),
        ("lcx.mixers.mine", "def f():\n    import einops"),
        ("lcx.data.rows", "def f():\n    import datasets"),
        ("pallas_kernels.attention_tpu", "from jax.experimental import pallas\nfrom lcx.ops.types import Mask"),
        ("lcx.ops.dispatch", "from pallas_kernels import KERNELS"),
        ("lcx.train", "from lcx.train_loop.loop import Run"),
        ("lcx.benchmarks.tune", "from pallas_kernels import tiles"),
    ],
)
def test_the_import_check_allows_what_is_meant(module, line):
    assert violations(line, module) == []


def entries() -> list[tuple[str, str]]:
    return [(table, name) for table in TABLES for name in TABLES[table]]


@pytest.mark.parametrize("table,name", entries(), ids=lambda part: str(part))
def test_every_part_of_a_table_has_a_config_with_defaults(table, name):
    part = registry.load(TABLES[table], name, field=table)
    assert dataclasses.is_dataclass(part.Config) and part.Config.__dataclass_params__.frozen
    assert part.Config() == part.Config(**registry.config_fields(part.Config))
    assert part.Config.__doc__, "the options say what they mean"


def test_a_field_without_a_default_is_noticed():
    @dataclasses.dataclass
    class Config:
        width: int

    with pytest.raises(TypeError, match="width needs a default"):
        registry.config_fields(Config)


@pytest.mark.parametrize("op,name", [(op, name) for op in KERNELS for name in KERNELS[op]])
def test_every_kernel_of_the_table_can_be_asked_whether_it_refuses(op, name):
    assert callable(registry.load(KERNELS[op], name, field=op).refuse)


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_of_the_table_has_its_three_functions(name):
    strategy = registry.load(STRATEGIES, name, field="strategy")
    assert all(callable(getattr(strategy, function)) for function in ("refuse", "forward", "backward"))


def test_loading_a_config_imports_neither_trackers_nor_data_sets_nor_pallas():
    heavy = ["wandb", "tensorflow_datasets", "torch", "matplotlib", "tensorboardX", "datasets", "tensorflow"]
    heavy += ["jax.experimental.pallas", "orbax", "grain"]
    code = f"import sys, lcx.config; lcx.config.base(); print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
