"""Copy: random symbols, a separator, the same symbols again."""

import dataclasses

import numpy as np

from lcx.data.tasks.rows import TaskRows
from lcx.data.tokenizers import Ids
from lcx.registry import UserError


@dataclasses.dataclass(frozen=True)
class Config:
    """Attributes:
    symbols: number of different symbols.
    loss_on: "answers" or "all" labels.
    held_out_rows: size of the held-out set.
    """

    symbols: int = 64
    loss_on: str = "answers"
    held_out_rows: int = 64


class Copy:
    """A row of L tokens: n symbols, the separator, the n symbols again, n = (L - 1) // 2; an even L ends with another separator.

    Ids 0..symbols-1 are the symbols, `symbols` is the separator. The answers are the second n symbols: every one must be
    fetched from n + 1 tokens before. A batch of an even sequence length S has rows of L = S + 1, n = S / 2.
    """

    Config = Config
    generated = True
    name = "copy"

    def __init__(self, config: Config):
        if config.symbols < 2:
            raise UserError(f"datasets.copy.symbols={config.symbols} must be at least 2")
        self.config = config
        self.vocab_size = config.symbols + 1
        self.tokenizer = Ids(self.vocab_size)

    def rows(self, **which) -> TaskRows:
        return TaskRows(self, **which)

    def draw(self, random: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        count = (length - 1) // 2
        if count < 1:
            raise UserError(f"data.source='copy' needs rows of at least 3 tokens, not {length}")
        tokens = np.full(length, self.config.symbols, np.int32)
        tokens[:count] = random.integers(self.config.symbols, size=count, dtype=np.int32)
        tokens[count + 1 : 2 * count + 1] = tokens[:count]
        is_answer = np.zeros(length, bool)
        is_answer[count + 1 : 2 * count + 1] = True
        return tokens, is_answer
