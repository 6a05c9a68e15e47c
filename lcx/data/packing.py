"""How the documents of a split become rows of S tokens: plans that know pieces, never tokens.

A piece is a run of tokens of one document inside one row. A plan answers "which pieces lie in columns [a, b) of row r"
from document offsets alone, so that a host can build its own slice of a row of a billion tokens.
"""

import bisect
from typing import NamedTuple, Protocol

import numpy as np


class Pieces(NamedTuple):
    """Pieces of one row in column order, each directly after the one before; int64 arrays of one length.

    start: first token, in the split's numbering. column: where in the row. length: tokens.
    number: 1-based number in the row. has_label: bool, whether the piece's last token has a next token to predict.
    """

    start: np.ndarray
    column: np.ndarray
    length: np.ndarray
    number: np.ndarray
    has_label: np.ndarray


class Plan(Protocol):
    num_rows: int

    def pieces(self, row: int, a: int, b: int) -> Pieces:
        """The whole pieces that touch columns a <= c < b of a row."""

    def row_tokens(self, row: int) -> int:
        """Tokens in a row, padding not counted."""


class ConcatPlan:
    """Row r is tokens [r S, (r + 1) S) of the documents in a row; the last row may be short. O(log documents) per question."""

    def __init__(self, offsets: np.ndarray, sequence_length: int):
        self._offsets = offsets
        self._length = sequence_length
        self._tokens = int(offsets[-1])
        self.num_rows = -(-self._tokens // sequence_length)

    def row_tokens(self, row: int) -> int:
        return min(self._length, self._tokens - row * self._length)

    def pieces(self, row: int, a: int, b: int) -> Pieces:
        begin = row * self._length
        end = begin + self.row_tokens(row)
        low, high = begin + a, min(begin + b, end)
        if low >= high:
            return Pieces(*(np.zeros(0, np.int64) for _ in range(4)), np.zeros(0, bool))
        first = int(np.searchsorted(self._offsets, low, "right")) - 1
        last = int(np.searchsorted(self._offsets, high, "left"))
        bounds = self._offsets[first : last + 1]  # first document's begin ... last document's end
        start, stop = np.maximum(bounds[:-1], begin), np.minimum(bounds[1:], end)
        before = int(np.searchsorted(self._offsets, begin, "right")) - 1  # the document that holds the row's first token
        number = np.arange(first, last) - before + 1
        return Pieces(start, start - begin, stop - start, number, stop < bounds[1:])


class StreamPlan(ConcatPlan):
    """The rows of `ConcatPlan` without document boundaries: one piece per row."""

    def __init__(self, offsets: np.ndarray, sequence_length: int):
        super().__init__(offsets[[0, -1]], sequence_length)


class RowsPlan:
    """Rows that were filled one by one: 40 bytes per piece on every host.

    Args:
      offsets: int64 (documents + 1).
      sequence_length: S; longer documents are cut in pieces of S.
      best_fit: whether pieces share rows.
    """

    def __init__(self, offsets: np.ndarray, sequence_length: int, *, best_fit: bool):
        counts = -(-np.diff(offsets) // sequence_length)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        start = np.repeat(offsets[:-1], counts) + within * sequence_length
        document_end = np.repeat(offsets[1:], counts)
        length = np.minimum(document_end - start, sequence_length)
        row = _best_fit_rows(length, sequence_length) if best_fit else np.arange(len(start))
        order = np.argsort(row, kind="stable")  # pieces of a row stay in document order
        self.num_rows = int(row.max()) + 1
        self._first = np.searchsorted(row[order], np.arange(self.num_rows + 1))
        self._start, self._piece_length = start[order], length[order]
        self._has_label = (start + length < document_end)[order]
        total = np.cumsum(self._piece_length)
        self._before = np.concatenate([[0], total])  # tokens in all pieces before this one

    def row_tokens(self, row: int) -> int:
        return int(self._before[self._first[row + 1]] - self._before[self._first[row]])

    def pieces(self, row: int, a: int, b: int) -> Pieces:
        begin, end = int(self._first[row]), int(self._first[row + 1])
        column = self._before[begin : end + 1] - self._before[begin]
        low = int(np.searchsorted(column[1:], a, "right"))
        high = max(low, int(np.searchsorted(column[:-1], b, "left")))
        part = slice(begin + low, begin + high)
        number = np.arange(low, high) + 1
        return Pieces(self._start[part], column[low:high], self._piece_length[part], number, self._has_label[part])


def _best_fit_rows(length: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each piece: longest first, each into the open row it leaves least space in. O(pieces log rows)."""
    row = np.empty(len(length), np.int64)
    spaces: list[int] = []  # distinct free spaces, ascending
    rows_with: dict[int, list[int]] = {}
    opened = 0
    for piece in np.argsort(-length, kind="stable").tolist():
        size = int(length[piece])
        at = bisect.bisect_left(spaces, size)
        if at == len(spaces):
            space, chosen, opened = capacity, opened, opened + 1
        else:
            space = spaces[at]
            chosen = rows_with[space].pop()
            if not rows_with[space]:
                del rows_with[space], spaces[at]
        row[piece] = chosen
        left = space - size
        if left:
            if left not in rows_with:
                bisect.insort(spaces, left)
                rows_with[left] = []
            rows_with[left].append(chosen)
    return row


def make_plan(packing: str, offsets: np.ndarray, sequence_length: int) -> Plan:
    """The plan of a `DataConfig.packing` for documents at `offsets` (int64, documents + 1, strictly ascending from 0)."""
    if packing in ("concat", "stream"):
        return (ConcatPlan if packing == "concat" else StreamPlan)(offsets, sequence_length)
    return RowsPlan(offsets, sequence_length, best_fit=packing == "best_fit")
