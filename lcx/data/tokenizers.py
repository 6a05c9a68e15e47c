"""Text <-> token ids: bytes, tokenizer.json (Hugging Face), SentencePiece, or bare ids.

A tokenizer adds no token of its own: where a document ends is known from the offsets of the store.
"""

import pathlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import xxhash

from lcx.registry import UserError


class Tokenizer(Protocol):
    """`vocab_size` ids 0..vocab_size-1; `file` is the path it was read from, or "" for one without a file."""

    vocab_size: int
    file: str

    def encode(self, text: str) -> np.ndarray:
        """str -> int array of token ids."""

    def decode(self, ids: Sequence[int]) -> str:
        """Token ids -> str."""


class Bytes:
    """UTF-8 bytes: ids 0..255 are the byte values, there are no special ids. `decode` shows broken sequences as U+FFFD."""

    vocab_size = 256
    file = ""

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8)

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(bytearray(int(i) for i in ids)).decode("utf-8", errors="replace")


class Ids:
    """No tokenizer: text is decimal ids with blanks between. For token files and tasks, whose ids have no text."""

    file = ""

    def __init__(self, vocab_size: int = 0):
        self.vocab_size = vocab_size

    def encode(self, text: str) -> np.ndarray:
        try:
            return np.array([int(word) for word in text.split()], np.int64)
        except ValueError:
            raise UserError(f"data.tokenizer='ids' reads decimal ids with blanks between, not {text[:40]!r}") from None

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(str(int(i)) for i in ids)


class TokenizerJson:
    """A tokenizer.json of the Hugging Face `tokenizers` library."""

    def __init__(self, path: str):
        try:
            import tokenizers
        except ImportError:
            raise UserError(f"data.tokenizer={path!r} needs the package `tokenizers`: pip install 'lcx[tokenizers]'") from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(path)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"data.tokenizer={path!r} is not a tokenizer.json: {error}") from None
        self.file = path
        self.vocab_size = self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


class SentencePiece:
    """A SentencePiece .model file."""

    def __init__(self, path: str):
        try:
            import sentencepiece
        except ImportError:
            raise UserError(f"data.tokenizer={path!r} needs the package `sentencepiece`: pip install 'lcx[tokenizers]'") from None
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=path)
        except (OSError, RuntimeError) as error:
            raise UserError(f"data.tokenizer={path!r} is not a SentencePiece model: {error}") from None
        self.file = path
        self.vocab_size = self._processor.vocab_size()

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._processor.encode(text), np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(i) for i in ids])


def load_tokenizer(name: str) -> Tokenizer:
    """ "bytes", "ids", or the path of a `.json` or `.model` file -> tokenizer.

    Raises:
      UserError: there is no such file, it cannot be read, its kind is unknown, or its library is not installed.
    """
    if name == "bytes":
        return Bytes()
    if name == "ids":
        return Ids()
    kinds = {".json": TokenizerJson, ".model": SentencePiece}
    path = pathlib.Path(name)
    if path.suffix not in kinds or not path.is_file():
        reason = "there is no such file" if path.suffix in kinds else "it is none of these"
        raise UserError(
            f"data.tokenizer={name!r}: {reason} (valid: bytes, ids, the path of a tokenizer.json or of a SentencePiece .model)"
        )
    return kinds[path.suffix](str(path))


def identity(tokenizer: Tokenizer) -> str:
    """A string that differs between tokenizers: the kind, and the hash of its file."""
    kind = type(tokenizer).__name__.lower()
    return f"{kind}-{xxhash.xxh3_64_hexdigest(pathlib.Path(tokenizer.file).read_bytes())}" if tokenizer.file else kind
