"""The source code of the running Python's standard library: real text that is on every machine, offline."""

import dataclasses
import pathlib
import sys
from collections.abc import Iterator
from typing import Any


@dataclasses.dataclass(frozen=True)
class Config:
    """No options."""


class StdlibText:
    """Every module of the standard library is a document, in the order of their paths; tests and installed packages are left out.

    The documents go through a TFDS builder (`lcx.data.sources.stdlib_builder`) under `<cache_dir>/tfds`, versioned as Python
    is, so that another interpreter prepares them anew. About 11 MB.
    """

    Config = Config
    generated = False
    holds_tokens = False

    def __init__(self, config: Config):
        del config

    def identity(self, cache_dir: pathlib.Path) -> dict[str, Any]:
        return {"python": list(sys.version_info[:3])}

    def documents(self, cache_dir: pathlib.Path) -> Iterator[str]:
        from lcx.data.sources import stdlib_builder, tfds

        with tfds.quiet():
            builder = stdlib_builder.StdlibText(data_dir=cache_dir / "tfds", file_format="array_record")
            builder.download_and_prepare()
            records = builder.as_data_source("train")
        for record in records:
            yield record["text"].decode("utf-8")
