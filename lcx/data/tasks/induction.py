"""Induction heads (Olsson et al. 2022, arXiv:2209.11895) in the form of "Mamba" (arXiv:2312.00752, section 4.1.2)."""

import dataclasses

import numpy as np

from lcx.data.tasks.rows import TaskRows
from lcx.data.tokenizers import Ids
from lcx.registry import UserError


@dataclasses.dataclass(frozen=True)
class Config:
    """Attributes:
    vocab: vocabulary size, the special token included.
    depth: where the special token stands, as a fraction of the places it can have (0 first, 1 last, directly before the
      question); -1 draws it uniformly, as the paper does.
    loss_on: "answers" or "all" labels.
    held_out_rows: size of the held-out set.
    """

    vocab: int = 16
    depth: float = -1.0
    loss_on: str = "answers"
    held_out_rows: int = 64


class Induction:
    """A row: random tokens, the special token once among them, the special token again, and the token that followed it before.

    Ids 0..vocab-2 are drawn uniformly, `vocab - 1` is the special token. The answer is the last token of the row.
    """

    Config = Config
    generated = True

    def __init__(self, config: Config):
        if config.vocab < 3:
            raise UserError(f"datasets.induction.vocab={config.vocab} must be at least 3: two tokens and the special one")
        if config.depth != -1 and not 0 <= config.depth <= 1:
            raise UserError(f"datasets.induction.depth={config.depth} must be from 0 to 1, or -1 for a random depth")
        self.config = config
        self.vocab_size = config.vocab
        self.tokenizer = Ids(self.vocab_size)

    def rows(self, **which) -> TaskRows:
        return TaskRows(self, **which)

    def draw(self, random: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        last = length - 4  # behind the special token: the one to remember, the question and the answer
        if last < 0:
            raise UserError(f"data.source='induction' needs rows of at least 4 tokens, not {length}")
        special = self.config.vocab - 1
        tokens = random.integers(special, size=length, dtype=np.int32)
        drawn = int(random.integers(last + 1))
        at = drawn if self.config.depth == -1 else round(self.config.depth * last)
        tokens[at] = tokens[-2] = special
        tokens[-1] = tokens[at + 1]
        is_answer = np.zeros(length, bool)
        is_answer[-1] = True
        return tokens, is_answer
