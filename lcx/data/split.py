"""Which documents train and which are held out; a split numbers its own tokens 0, 1, 2, ... without copying them."""

from typing import TYPE_CHECKING

import numpy as np

from lcx.registry import UserError, unknown

if TYPE_CHECKING:
    from lcx.data.store import TokenStore

SPLITS = ("train", "held_out")


class Split:
    """Documents of a store, their tokens numbered consecutively.

    Args:
      store: where the tokens are.
      starts, stops: int64 (documents), the ranges of the store, ascending.

    Attributes:
      offsets: int64 (documents + 1), where each document begins in this split's numbering.
      num_tokens: offsets[-1].
    """

    def __init__(self, store: "TokenStore", starts: np.ndarray, stops: np.ndarray):
        self.store = store
        self.offsets = np.concatenate([[0], np.cumsum(stops - starts)]).astype(np.int64)
        self.num_tokens = int(self.offsets[-1])
        # Neighbours in the store are read together: a run begins where a document does not follow the one before.
        first = np.flatnonzero(np.concatenate([[True], starts[1:] != stops[:-1]]))
        self._run_starts = self.offsets[first]
        self._run_in_store = starts[first]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start <= t < stop of the split, in the store's dtype; reads nothing else."""
        parts = []
        run = int(np.searchsorted(self._run_starts, start, "right")) - 1
        while start < stop:
            end = min(stop, int(self._run_starts[run + 1]) if run + 1 < len(self._run_starts) else self.num_tokens)
            shift = int(self._run_in_store[run] - self._run_starts[run])
            parts.append(self.store.read(start + shift, end + shift))
            start, run = end, run + 1
        return np.concatenate(parts) if len(parts) != 1 else parts[0]


def choose_held_out(store: "TokenStore", fraction: float, held_out: str, name: str) -> Split:
    """The named split of a store; see `DataConfig.held_out`.

    Raises:
      UserError: an unknown name, or no token is left for the split.
    """
    if name not in SPLITS:
        raise unknown("split", name, SPLITS)
    starts, stops = store.offsets[:-1], store.offsets[1:]
    budget = fraction * store.num_tokens
    if name == "held_out" and fraction == 0:
        raise UserError("data.held_out_fraction=0 leaves nothing to evaluate on")
    if held_out == "tail":
        cut = store.num_tokens - int(np.ceil(budget))
        starts, stops = (starts, np.minimum(stops, cut)) if name == "train" else (np.maximum(starts, cut), stops)
        keep = stops > starts
    elif fraction == 0:
        keep = np.ones(len(starts), bool)
    else:
        order = np.argsort(store.hashes, kind="stable")
        total = np.cumsum((stops - starts)[order])
        count = max(1, int(np.searchsorted(total, budget, "right")))
        limit = store.hashes[order[count - 1]]  # by value, so that copies of a text stay on one side
        keep = (store.hashes <= limit) == (name == "held_out")
    if not keep.any():
        raise UserError(
            f"data.held_out={held_out!r} with data.held_out_fraction={fraction} leaves no token for the {name} split "
            f"({store.num_documents} documents, {store.num_tokens} tokens); data.held_out='tail' splits within a document"
        )
    return Split(store, starts[keep], stops[keep])
