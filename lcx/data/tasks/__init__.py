"""Synthetic tasks with known answers, one file each. `Task` is what `lcx.data.tasks.rows` asks of them."""

from typing import Any, ClassVar, Protocol

import numpy as np

from lcx.data.tokenizers import Tokenizer


class Task(Protocol):
    """A task; a class with a frozen dataclass `Config` that holds `loss_on` and `held_out_rows`.

    Attributes:
      vocab_size: ids are below it.
      tokenizer: shows ids as text.
    """

    generated: ClassVar[bool]
    vocab_size: int
    tokenizer: Tokenizer
    config: Any

    def draw(self, random: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        """One row: tokens int32 (length), and bool (length), which of them are answers.

        Raises:
          UserError: the row is too short for the task.
        """
