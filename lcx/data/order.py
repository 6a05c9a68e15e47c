"""Which rows make batch i: a function of (seed, i) alone, the same on every host, iterated through grain."""

import json
import sys
from typing import Any

import grain
import numpy as np


class RowOrder:
    """An iterator of int64 arrays of at most `batch` row numbers.

    Args:
      num_rows: rows of one epoch; 0 for a task, which draws a new row each time.
      batch: rows per batch; the last batch of an epoch may have fewer.
      seed: seed of the shuffle, which differs from epoch to epoch.
      shuffle: whether to shuffle.
      repeat: whether epoch follows epoch, or the iterator ends after the first.
    """

    def __init__(self, num_rows: int, batch: int, *, seed: int, shuffle: bool, repeat: bool):
        self.batches_per_epoch = -(-num_rows // batch)
        rows = grain.MapDataset.range(num_rows or sys.maxsize // 2)
        if shuffle and num_rows:
            rows = rows.shuffle(seed=seed)
        batches = rows.batch(batch, drop_remainder=False)
        self._dataset = batches.repeat() if repeat and num_rows else batches
        self.reset()

    def reset(self) -> None:
        """Back to the first batch."""
        # Descriptors are a few bytes: threads and read-ahead would cost more than they hide.
        self._iterator = iter(self._dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))

    def __next__(self) -> np.ndarray:
        return next(self._iterator)

    def state(self) -> dict[str, Any]:
        """grain's iterator state: a few bytes of JSON."""
        return json.loads(json.dumps(self._iterator.get_state()))

    def restore(self, state: dict[str, Any]) -> None:
        self._iterator.set_state(state)
