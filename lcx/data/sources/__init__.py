"""Sources of documents, one file each. `Source` is what `lcx.data.prepare` asks of them.

The modules import nothing optional or slow at the top: reading `Config` must stay free of charge.
"""

import pathlib
from collections.abc import Iterator
from typing import Any, ClassVar, Protocol

import numpy as np

from lcx.data.tokenizers import Tokenizer


class Source(Protocol):
    """A source of documents; a class with a frozen dataclass `Config`, made with one.

    Attributes:
      generated: False (True for the tasks, which need no store).
      holds_tokens: documents are integer arrays and the source knows their vocabulary, else they are str.
    """

    generated: ClassVar[bool]
    holds_tokens: ClassVar[bool]

    def identity(self, cache_dir: pathlib.Path) -> dict[str, Any]:
        """JSON that changes whenever the documents would: a new identity is prepared anew."""

    def documents(self, cache_dir: pathlib.Path) -> Iterator[str] | Iterator[np.ndarray]:
        """The documents, always in the same order. May keep downloads under `cache_dir`."""

    def vocab_size(self, tokenizer: Tokenizer) -> int:
        """Only where `holds_tokens`: ids are below it."""
