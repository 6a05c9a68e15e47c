"""The token store: a directory of memory-mapped tokens, document offsets and checksums.

tokens.bin     the documents one after the other; uint8, uint16 or uint32, the smallest that holds the vocabulary
offsets.npy    int64 (documents + 1): document d is tokens[offsets[d]:offsets[d + 1]]
hashes.npy     uint64 (documents): xxh3 of each document's text, which decides the held-out split
blocks.npy     uint64: xxh3 of every MiB of tokens.bin
store.json     counts, dtype, tokenizer, source, checksums of the other files
tokenizer.*    a copy of the tokenizer's file, where it has one
"""

import json
import os
import pathlib
import shutil
from collections.abc import Iterable
from typing import Any

import numpy as np
import xxhash

from lcx.data import tokenizers
from lcx.data.split import Split, choose_held_out
from lcx.registry import UserError

FORMAT = 1
BLOCK_BYTES = 1 << 20
BLOCKS_CHECKED_ON_OPEN = 256


def smallest_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned type for ids below `vocab_size`."""
    for dtype in (np.uint8, np.uint16, np.uint32):
        if vocab_size <= np.iinfo(dtype).max + 1:
            return np.dtype(dtype)
    raise UserError(f"a vocabulary of {vocab_size} ids does not fit 32 bits")


class StoreWriter:
    """Writes a store into an empty directory, document by document; leaving its `with` block without an error completes it.

    Args:
      directory: an existing, empty directory.
      tokenizer: what the ids mean.
      vocab_size: ids must be below it.
      source: what the store was made from (JSON), for people.
    """

    def __init__(self, directory: pathlib.Path, tokenizer: tokenizers.Tokenizer, vocab_size: int, source: dict[str, Any]):
        self._directory = directory
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._source = source
        self._dtype = smallest_dtype(vocab_size)
        self._file = open(directory / "tokens.bin", "wb")
        self._offsets = [0]
        self._hashes: list[int] = []
        self._blocks: list[int] = []
        self._block = xxhash.xxh3_64()
        self._block_left = BLOCK_BYTES
        self.text_bytes = 0

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, error_type: type | None, *_: Any) -> None:
        try:
            if error_type is None:
                self._complete()
        finally:
            self._file.close()

    def add(self, ids: np.ndarray, *, text: bytes | None = None) -> None:
        """Appends one document (an empty one is left out).

        Args:
          ids: integer array (tokens), a memory map included: it is copied a few MiB at a time.
          text: what is hashed for the split; None hashes the ids.

        Raises:
          UserError: an id is outside the vocabulary.
        """
        if not len(ids):
            return
        text_hash = xxhash.xxh3_64(text or b"")
        for start in range(0, len(ids), BLOCK_BYTES):
            part = np.asarray(ids[start : start + BLOCK_BYTES])
            if part.min() < 0 or part.max() >= self._vocab_size:
                bad = part.max() if part.max() >= self._vocab_size else part.min()
                raise UserError(f"document {len(self._hashes)} holds id {bad}, outside the vocabulary of {self._vocab_size} ids")
            data = part.astype(self._dtype).tobytes()
            if text is None:
                text_hash.update(data)
            self._write(data)
        self._offsets.append(self._offsets[-1] + len(ids))
        self._hashes.append(text_hash.intdigest())
        self.text_bytes += len(text) if text is not None else len(ids) * self._dtype.itemsize

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        view = memoryview(data)
        while view:
            piece, view = view[: self._block_left], view[self._block_left :]
            self._block.update(piece)
            self._block_left -= len(piece)
            if not self._block_left:
                self._end_block()

    def _end_block(self) -> None:
        self._blocks.append(self._block.intdigest())
        self._block = xxhash.xxh3_64()
        self._block_left = BLOCK_BYTES

    def _complete(self) -> None:
        """Flushes the tokens to disk; writes offsets, checksums and store.json. UserError if there is no document."""
        if not self._hashes:
            raise UserError(f"data.source={self._source.get('source')!r} has no documents")
        if self._block_left < BLOCK_BYTES:
            self._end_block()
        self._file.flush()
        os.fsync(self._file.fileno())
        arrays = {
            "offsets.npy": np.array(self._offsets, np.int64),
            "hashes.npy": np.array(self._hashes, np.uint64),
            "blocks.npy": np.array(self._blocks, np.uint64),
        }
        for name, array in arrays.items():
            np.save(self._directory / name, array)
        tokenizer_file = ""
        if self._tokenizer.file:
            tokenizer_file = "tokenizer" + pathlib.Path(self._tokenizer.file).suffix
            shutil.copyfile(self._tokenizer.file, self._directory / tokenizer_file)
        meta = {
            "format": FORMAT,
            "dtype": self._dtype.name,
            "vocab_size": self._vocab_size,
            "num_tokens": self._offsets[-1],
            "num_documents": len(self._hashes),
            "text_bytes": self.text_bytes,
            "tokenizer": tokenizers.identity(self._tokenizer),
            "tokenizer_file": tokenizer_file,
            "source": self._source,
            "checksums": {name: _file_hash(self._directory / name) for name in [*arrays, *filter(None, [tokenizer_file])]},
        }
        (self._directory / "store.json").write_text(json.dumps(meta, indent=1, sort_keys=True))


def _file_hash(path: pathlib.Path) -> str:
    return xxhash.xxh3_64_hexdigest(path.read_bytes())


class TokenStore:
    """An open store.

    Args:
      directory: where `StoreWriter` wrote it.
      held_out_fraction, held_out: as in `lcx.data.config.DataConfig`.

    Raises:
      UserError: the directory is no store, or a checksum does not match. Small files are checked whole, tokens.bin whole
        up to 256 MiB and beyond that in 256 blocks spread over it; `verify` checks every block.
    """

    def __init__(self, directory: str | os.PathLike, *, held_out_fraction: float = 0.02, held_out: str = "documents"):
        self.directory = pathlib.Path(directory)
        self._held_out_fraction = held_out_fraction
        self._held_out = held_out
        try:
            self.meta = json.loads((self.directory / "store.json").read_text())
            if self.meta["format"] != FORMAT:
                raise self._broken(f"it has format {self.meta['format']} and this version reads {FORMAT}")
            for name, checksum in self.meta["checksums"].items():
                if _file_hash(self.directory / name) != checksum:
                    raise self._broken(f"{name} does not match its checksum")
            self.offsets = np.load(self.directory / "offsets.npy")
            self.hashes = np.load(self.directory / "hashes.npy")
            self._blocks = np.load(self.directory / "blocks.npy")
            self._tokens = np.memmap(self.directory / "tokens.bin", self.meta["dtype"], "r")
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._broken(str(error) or repr(error)) from None
        if len(self._tokens) != self.num_tokens:
            raise self._broken(f"tokens.bin holds {len(self._tokens)} tokens and should hold {self.num_tokens}")
        count = len(self._blocks)
        self.verify(np.unique(np.linspace(0, count - 1, min(count, BLOCKS_CHECKED_ON_OPEN)).astype(np.int64)))

    def _broken(self, reason: str) -> UserError:
        return UserError(f"the token store {self.directory} cannot be used: {reason}; delete that directory to prepare it again")

    def verify(self, blocks: Iterable[int] | None = None) -> None:
        """Compares blocks of tokens.bin (all of them by default) with their checksums.

        Raises:
          UserError: a block differs.
        """
        per_block = BLOCK_BYTES // self._tokens.itemsize
        for block in range(len(self._blocks)) if blocks is None else blocks:
            data = self._tokens[block * per_block : (block + 1) * per_block]
            if xxhash.xxh3_64_intdigest(np.ascontiguousarray(data)) != int(self._blocks[block]):
                raise self._broken(f"tokens.bin does not match its checksum in MiB {block}")

    @property
    def vocab_size(self) -> int:
        return self.meta["vocab_size"]

    @property
    def num_tokens(self) -> int:
        return self.meta["num_tokens"]

    @property
    def num_documents(self) -> int:
        return self.meta["num_documents"]

    @property
    def checksum(self) -> str:
        """16 hex digits that differ between stores of different tokens or documents."""
        return xxhash.xxh3_64_hexdigest(self._blocks.tobytes() + self.offsets.tobytes())

    @property
    def tokenizer(self) -> tokenizers.Tokenizer:
        """The tokenizer of the ids, from the store's own copy of its file."""
        if self.meta["tokenizer_file"]:
            return tokenizers.load_tokenizer(str(self.directory / self.meta["tokenizer_file"]))
        return (
            tokenizers.Ids(self.vocab_size)
            if self.meta["tokenizer"] == "ids"
            else tokenizers.load_tokenizer(self.meta["tokenizer"])
        )

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start <= t < stop of the whole store, in its own dtype: the only place that touches tokens after opening."""
        return np.asarray(self._tokens[start:stop])

    def split(self, name: str) -> Split:
        """The "train" or the "held_out" documents.

        Raises:
          UserError: an unknown name, or a split without a token.
        """
        return choose_held_out(self, self._held_out_fraction, self._held_out, name)
