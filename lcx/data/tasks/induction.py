"""Induction heads (Olsson et al. 2022, arXiv:2209.11895) in the form of "Mamba" (arXiv:2312.00752, section 4.1.2)."""

import dataclasses

import numpy as np

from lcx.data.tasks.rows import TaskRows
from lcx.data.tokenizers import Ids
from lcx.registry import UserError, unknown

DISTANCES = ("uniform", "log", "longest")


@dataclasses.dataclass(frozen=True)
class Config:
    """Attributes:
    vocab: vocabulary size, the special token included.
    distance: how far back the special token stands from the question. "uniform" draws its place uniformly, as the paper does;
      "log" draws the distance log-uniformly, so that half of the rows have one below the square root of the longest and a
      model learns the task in a small part of the steps; "longest" puts it first in the row.
    loss_on: "answers" or "all" labels.
    held_out_rows: size of the held-out set.
    """

    vocab: int = 16
    distance: str = "uniform"
    loss_on: str = "answers"
    held_out_rows: int = 64


class Induction:
    """A row: random tokens, the special token once among them, the special token again, and the token that followed it before.

    Ids 0..vocab-2 are drawn uniformly, `vocab - 1` is the special token. The answer is the last token of the row.
    """

    Config = Config
    generated = True
    name = "induction"

    def __init__(self, config: Config):
        if config.vocab < 3:
            raise UserError(f"datasets.induction.vocab={config.vocab} must be at least 3: two tokens and the special one")
        if config.distance not in DISTANCES:
            raise unknown("datasets.induction.distance", config.distance, DISTANCES)
        self.config = config
        self.vocab_size = config.vocab
        self.tokenizer = Ids(self.vocab_size)

    def rows(self, **which) -> TaskRows:
        return TaskRows(self, **which)

    def draw(self, random: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        longest = length - 2  # from the first token to the question; the shortest has the token to remember between
        if longest < 2:
            raise UserError(f"data.source='induction' needs rows of at least 4 tokens, not {length}")
        special = self.config.vocab - 1
        tokens = random.integers(special, size=length, dtype=np.int32)
        match self.config.distance:
            case "uniform":
                distance = int(random.integers(2, longest + 1))
            case "log":
                distance = int(2 * ((longest + 1) / 2) ** random.random())
            case "longest":
                distance = longest
        at = longest - distance
        tokens[at] = tokens[-2] = special
        tokens[-1] = tokens[at + 1]
        is_answer = np.zeros(length, bool)
        is_answer[-1] = True
        return tokens, is_answer
