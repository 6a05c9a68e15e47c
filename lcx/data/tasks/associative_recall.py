"""Multi-query associative recall (MQAR; Arora et al. 2023, "Zoology", arXiv:2312.04927)."""

import dataclasses

import numpy as np

from lcx.data.tasks.rows import TaskRows
from lcx.data.tokenizers import Ids
from lcx.registry import UserError


@dataclasses.dataclass(frozen=True)
class Config:
    """Attributes:
    num_pairs: key-value pairs, and queries, per row.
    vocab: vocabulary size; see `AssociativeRecall`.
    gap: smallest distance, in tokens, from a key to its query. A layer whose window is below it cannot answer alone.
    loss_on: "answers" or "all" labels.
    held_out_rows: size of the held-out set.
    """

    num_pairs: int = 16
    vocab: int = 128
    gap: int = 0
    loss_on: str = "answers"
    held_out_rows: int = 64


class AssociativeRecall:
    """A row: key value key value ..., then every key once more, each directly followed by its value, filler elsewhere.

    Id 0 is the filler, 1..k with k = (vocab - 1) // 2 are keys, k+1..vocab-1 are values. The keys of a row differ, the values
    are free. Queries stand in random order at random even distances behind the first place that is `gap` from the last key.
    The answers are the values that follow the queries.
    """

    Config = Config
    generated = True
    name = "associative_recall"

    def __init__(self, config: Config):
        self._keys = (config.vocab - 1) // 2
        if config.num_pairs < 1:
            raise UserError(f"datasets.associative_recall.num_pairs={config.num_pairs} must be at least 1")
        if config.gap < 0:
            raise UserError(f"datasets.associative_recall.gap={config.gap} must be at least 0")
        if config.num_pairs > self._keys:
            raise UserError(
                f"datasets.associative_recall.num_pairs={config.num_pairs} needs as many keys and "
                f"datasets.associative_recall.vocab={config.vocab} has {self._keys} (a filler, and half the rest)"
            )
        self.config = config
        self.vocab_size = config.vocab
        self.tokenizer = Ids(self.vocab_size)

    def rows(self, **which) -> TaskRows:
        return TaskRows(self, **which)

    def draw(self, random: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        pairs = self.config.num_pairs
        first = max(2 * pairs, 2 * (pairs - 1) + self.config.gap)
        places = (length - first) // 2
        if places < pairs:
            raise UserError(
                f"datasets.associative_recall.num_pairs={pairs} and datasets.associative_recall.gap={self.config.gap} "
                f"need rows of at least {first + 2 * pairs} tokens, not {length}"
            )
        keys = 1 + random.choice(self._keys, pairs, replace=False)
        values = random.integers(self._keys + 1, self.config.vocab, size=pairs)
        queries = first + 2 * random.choice(places, pairs, replace=False)
        tokens = np.zeros(length, np.int32)
        tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2] = keys, values
        tokens[queries], tokens[queries + 1] = keys, values
        is_answer = np.zeros(length, bool)
        is_answer[queries + 1] = True
        return tokens, is_answer
