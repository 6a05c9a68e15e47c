"""Selective copying ("Mamba", Gu and Dao 2023, arXiv:2312.00752, section 4.1.1): what to remember stands at random places."""

import dataclasses

import numpy as np

from lcx.data.tasks.rows import TaskRows
from lcx.data.tokenizers import Ids
from lcx.registry import UserError


@dataclasses.dataclass(frozen=True)
class Config:
    """Attributes:
    num_tokens: data tokens to remember.
    vocab: vocabulary size; see `SelectiveCopy`.
    loss_on: "answers" or "all" labels.
    held_out_rows: size of the held-out set.
    """

    num_tokens: int = 16
    vocab: int = 16
    loss_on: str = "answers"
    held_out_rows: int = 64


class SelectiveCopy:
    """A row: data tokens at random places among filler, a separator, and the data tokens again in their order without filler.

    Id 0 is the filler, 1..vocab-2 are data tokens, drawn with repetition, `vocab - 1` is the separator. The answers are what
    follows the separator; as everywhere in this package, each is predicted with the answers before it in sight.
    """

    Config = Config
    generated = True
    name = "selective_copy"

    def __init__(self, config: Config):
        if config.num_tokens < 1:
            raise UserError(f"datasets.selective_copy.num_tokens={config.num_tokens} must be at least 1")
        if config.vocab < 4:
            raise UserError(
                f"datasets.selective_copy.vocab={config.vocab} must be at least 4: a filler, two data tokens and a separator"
            )
        self.config = config
        self.vocab_size = config.vocab
        self.tokenizer = Ids(self.vocab_size)

    def rows(self, **which) -> TaskRows:
        return TaskRows(self, **which)

    def draw(self, random: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        count, separator = self.config.num_tokens, self.config.vocab - 1
        places = length - count - 1
        if places < count:
            raise UserError(
                f"datasets.selective_copy.num_tokens={count} needs rows of at least {2 * count + 1} tokens, not {length}"
            )
        data = random.integers(1, separator, size=count, dtype=np.int32)
        tokens = np.zeros(length, np.int32)
        tokens[np.sort(random.choice(places, count, replace=False))] = data
        tokens[places], tokens[places + 1 :] = separator, data
        is_answer = np.zeros(length, bool)
        is_answer[places + 1 :] = True
        return tokens, is_answer
