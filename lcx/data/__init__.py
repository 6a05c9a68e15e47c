"""Data: sources, token store, packing, and a loader whose hosts read only the tokens that their devices hold.

A source of documents (`lcx.data.sources`) is prepared once into a token store; a task (`lcx.data.tasks`) draws its rows
from a counter-based generator instead. Adding either is one new file and one line below.

    from lcx.data.config import DataConfig
    from lcx.data.loader import make_loader
    from lcx.data.prepare import prepare
"""

from typing import Any

from lcx import registry

DATASETS = {
    # documents
    "stdlib_text": "lcx.data.sources.stdlib_text:StdlibText",
    "text_folder": "lcx.data.sources.text_folder:TextFolder",
    "token_file": "lcx.data.sources.token_file:TokenFile",
    "tfds": "lcx.data.sources.tfds:Tfds",
    "hf": "lcx.data.sources.hf:HuggingFace",
    # synthetic tasks with known answers
    "copy": "lcx.data.tasks.copy:Copy",
    "associative_recall": "lcx.data.tasks.associative_recall:AssociativeRecall",
    "passkey": "lcx.data.tasks.passkey:Passkey",
    "induction": "lcx.data.tasks.induction:Induction",
    "selective_copy": "lcx.data.tasks.selective_copy:SelectiveCopy",
}

CATALOGUES = ("tfds", "hf")
"""Entries that hold many datasets and are written with the dataset's name: `tfds:lm1b`, `hf:owner/name`."""


def load_source(source: str) -> tuple[type, str]:
    """The class behind `data.source` and the name inside its catalogue ("" for the others). Its `Config` are its options.

    Raises:
      registry.UserError: the name is not in the table, or a catalogue's dataset is missing or superfluous.
    """
    name, colon, argument = source.partition(":")
    if name not in DATASETS:
        valid = [f"{n}:<name>" if n in CATALOGUES else n for n in DATASETS]
        raise registry.unknown("data.source", source, valid)
    if (name in CATALOGUES) != bool(argument) or (colon and not argument):
        wanted = f"{name}:<name>" if name in CATALOGUES else name
        raise registry.UserError(f"data.source={source!r} must be written {wanted}")
    return registry.load(DATASETS, name, field="data.source"), argument


def build_source(source: str, source_config: Any = None) -> Any:
    """The source or task that `data.source` names, with its options (None: the defaults).

    Raises:
      registry.UserError: as in `load_source`, and whatever the part finds wrong in its options.
    """
    part, argument = load_source(source)
    options = part.Config() if source_config is None else source_config
    built = part(options, argument) if argument else part(options)
    if built.generated and built.vocab_size > 2**31 - 1:
        raise registry.UserError(f"data.source={source!r} would have {built.vocab_size} ids; at most {2**31 - 1} fit int32")
    return built
