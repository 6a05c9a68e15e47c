"""Slices of the rows of a text split: tokens, labels, weights, positions, segments."""

import numpy as np

from lcx.data.packing import Pieces, make_plan
from lcx.data.split import Split
from lcx.data.tokenizers import Tokenizer

DTYPES = {"tokens": np.int32, "labels": np.int32, "weights": np.float32, "positions": np.int32, "segments": np.int32}


def empty_slice(length: int, extra: dict[str, type] | None = None) -> dict[str, np.ndarray]:
    """A slice of `length` columns of padding: everything 0."""
    return {name: np.zeros(length, dtype) for name, dtype in (DTYPES | (extra or {})).items()}


class TextRows:
    """The rows of a split under a packing.

    Args:
      split: the documents.
      packing: as in `DataConfig`.
      sequence_length: S.
      causal_labels: labels are the next token; else the token itself, for objectives that hide tokens in the step.
    """

    extra: dict[str, type] = {}

    def __init__(self, split: Split, packing: str, sequence_length: int, causal_labels: bool):
        self._split = split
        self._plan = make_plan(packing, split.offsets, sequence_length)
        self._causal = causal_labels
        self.num_rows = self._plan.num_rows
        self.vocab_size = split.store.vocab_size
        self.tokenizer: Tokenizer = split.store.tokenizer
        self.identity = split.store.checksum

    def row_tokens(self, row: int) -> int:
        """Tokens of a row without its padding."""
        return self._plan.row_tokens(row)

    def slice(self, row: int, a: int, b: int) -> dict[str, np.ndarray]:
        """Columns a <= c < b of a row, (b - a,) each; reads those tokens of the store and one more per run."""
        out = empty_slice(b - a)
        pieces = self._plan.pieces(row, a, b)
        if not len(pieces.start):
            return out
        low, high = np.maximum(pieces.column, a), np.minimum(pieces.column + pieces.length, b)
        count = high - low
        filled = slice(int(low[0]) - a, int(high[-1]) - a)
        out["segments"][filled] = np.repeat(pieces.number, count)
        out["positions"][filled] = np.arange(low[0], high[-1]) - np.repeat(pieces.column, count)
        out["weights"][filled] = 1
        for run_low, run_high, shift in _runs(pieces, low, high):
            more = int(self._causal and run_high + shift < self._split.num_tokens)
            ids = self._split.read(run_low + shift, run_high + shift + more)
            at = slice(run_low - a, run_high - a)
            out["tokens"][at] = ids[: run_high - run_low]
            labels = ids[int(self._causal) :]
            out["labels"][at.start : at.start + len(labels)] = labels
        if self._causal:
            unlabelled = (high - 1 - a)[~pieces.has_label & (high == pieces.column + pieces.length)]
            out["labels"][unlabelled] = 0
            out["weights"][unlabelled] = 0
        return out


def _runs(pieces: Pieces, low: np.ndarray, high: np.ndarray) -> list[tuple[int, int, int]]:
    """(first column, last column + 1, token - column) of neighbouring pieces whose tokens are neighbours too."""
    shift = pieces.start - pieces.column
    first = np.flatnonzero(np.concatenate([[True], shift[1:] != shift[:-1]]))
    last = np.concatenate([first[1:], [len(shift)]]) - 1
    return list(zip(low[first].tolist(), high[last].tolist(), shift[first].tolist(), strict=True))
