"""A file of token ids made elsewhere: a flat binary file, or a one-dimensional .npy."""

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from lcx.data.tokenizers import Ids, Tokenizer
from lcx.registry import UserError, unknown

DTYPES = ("uint8", "uint16", "uint32", "int32", "int64")
_CHUNK_TOKENS = 1 << 24


@dataclasses.dataclass(frozen=True)
class Config:
    """Attributes:
    path: the file; .npy carries its own type, any other name is read as a flat array of `dtype` in native byte order.
    dtype: type of a flat file.
    document_end: the id that ends a document (it stays its last token); -1: the file is one document.
    vocab_size: with data.tokenizer="ids", the number of ids; 0 takes the largest id + 1. A tokenizer has its own.
    """

    path: str = ""
    dtype: str = "uint16"
    document_end: int = -1
    vocab_size: int = 0


class TokenFile:
    """The documents of a token file, memory-mapped.

    Raises:
      UserError: no file, another shape or type, or ids outside the tokenizer's vocabulary.
    """

    Config = Config
    generated = False
    holds_tokens = True

    def __init__(self, config: Config):
        self._config = config
        self._path = pathlib.Path(config.path)
        if config.dtype not in DTYPES:
            raise unknown("datasets.token_file.dtype", config.dtype, DTYPES)
        if not config.path or not self._path.is_file():
            raise UserError(f"datasets.token_file.path={config.path!r} must be a file of token ids")
        try:
            npy = self._path.suffix == ".npy"
            self._tokens = np.load(self._path, mmap_mode="r") if npy else np.memmap(self._path, config.dtype, "r")
        except (ValueError, EOFError, OSError) as error:
            raise UserError(f"datasets.token_file.path={config.path!r} is not a flat array of {config.dtype}: {error}") from None
        if not isinstance(self._tokens, np.ndarray):
            raise UserError(f"datasets.token_file.path={config.path!r} is an archive of arrays, not one array")
        if self._tokens.ndim != 1 or self._tokens.dtype.kind not in "iu" or not len(self._tokens):
            raise UserError(
                f"datasets.token_file.path={config.path!r} holds {self._tokens.dtype}{list(self._tokens.shape)}, not a row of ids"
            )

    def identity(self, cache_dir: pathlib.Path) -> dict[str, Any]:
        stat = self._path.stat()
        return dataclasses.asdict(self._config) | {"path": self._path.name, "bytes": stat.st_size, "time": stat.st_mtime_ns}

    def vocab_size(self, tokenizer: Tokenizer) -> int:
        ids = isinstance(tokenizer, Ids)
        if self._config.vocab_size and not ids:
            raise UserError("datasets.token_file.vocab_size is read only with data.tokenizer='ids'; a tokenizer has its own")
        largest = max(int(chunk.max()) for _, chunk in self._chunks())
        size = (self._config.vocab_size or largest + 1) if ids else tokenizer.vocab_size
        if largest >= size:
            cure = "set it to 0 or higher" if ids else "name the right data.tokenizer, or 'ids' if there is none"
            limit = "datasets.token_file.vocab_size" if ids else "the tokenizer's vocabulary"
            raise UserError(f"datasets.token_file.path={self._config.path!r} holds id {largest}, and {limit} is {size}; {cure}")
        return size

    def documents(self, cache_dir: pathlib.Path) -> Iterator[np.ndarray]:
        start = 0
        if self._config.document_end >= 0:
            for at, chunk in self._chunks():
                for end in (np.flatnonzero(chunk == self._config.document_end) + at + 1).tolist():
                    yield self._tokens[start:end]
                    start = end
        yield self._tokens[start:]

    def _chunks(self) -> Iterator[tuple[int, np.ndarray]]:
        for at in range(0, len(self._tokens), _CHUNK_TOKENS):
            yield at, self._tokens[at : at + _CHUNK_TOKENS]
