"""The rows of a task: each a function of (task, seed, split, row number), from a counter-based generator."""

import dataclasses
import json
from typing import Any

import numpy as np
import xxhash

from lcx.data.rows import empty_slice
from lcx.data.tasks import Task
from lcx.registry import UserError, unknown

LOSS_ON = ("answers", "all")
_HELD_OUT_SHARE = 8
_ATTEMPTS = 1000


class TaskRows:
    """Rows drawn when asked for; the training rows have no end and no order to keep, the held-out rows are a fixed set.

    A host draws whole rows (4 bytes and a bool per token, some milliseconds per million tokens) and keeps its slices.
    One row in eight, chosen by the hash of its tokens, is a held-out row and the others are training rows: no row is both.

    Args:
      task: what to draw.
      seed, split: which rows.
      sequence_length: S.
      causal_labels: labels are the next token (S + 1 tokens are drawn, so that the last label exists); else the token itself.

    Raises:
      UserError: S is too short for the task, or the task has so few different rows that none can be held out.
    """

    extra: dict[str, type] = {"answers": np.bool_}

    def __init__(self, task: Task, *, seed: int, split: str, sequence_length: int, causal_labels: bool):
        if task.config.loss_on not in LOSS_ON:
            raise unknown(f"datasets.{task.name}.loss_on", task.config.loss_on, LOSS_ON)
        if task.config.held_out_rows < 1:
            raise UserError(f"datasets.{task.name}.held_out_rows={task.config.held_out_rows} must be at least 1")
        self._task = task
        self._length = sequence_length
        self._ahead = int(causal_labels)
        self._held_out = split == "held_out"
        self.num_rows = task.config.held_out_rows if self._held_out else 0
        self.vocab_size = task.vocab_size
        self.tokenizer = task.tokenizer
        self.identity = f"{type(task).__name__} {json.dumps(dataclasses.asdict(task.config), sort_keys=True)}"
        self._key = xxhash.xxh3_64_intdigest(f"{type(task).__name__} {seed} {split}".encode())
        self._last: tuple[int, Any] = (-1, None)
        self._row(0)  # a row that cannot be drawn is an error now, not at the first step

    def row_tokens(self, row: int) -> int:
        """Tokens of a row: a task fills it."""
        return self._length

    def slice(self, row: int, a: int, b: int) -> dict[str, np.ndarray]:
        """Columns a <= c < b of a row, (b - a,) each."""
        tokens, is_answer = self._row(row)
        out = empty_slice(b - a, self.extra)
        out["tokens"][:] = tokens[a:b]
        out["labels"][:] = tokens[a + self._ahead : b + self._ahead]
        out["answers"][:] = is_answer[a + self._ahead : b + self._ahead]
        out["weights"][:] = out["answers"] if self._task.config.loss_on == "answers" else 1
        out["positions"][:] = np.arange(a, b)
        out["segments"][:] = 1
        return out

    def _row(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        if self._last[0] != row:
            self._last = (row, self._draw(row))
        return self._last[1]

    def _draw(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        for attempt in range(_ATTEMPTS):
            # The generator counts up in the low words of the counter, so attempts in the high word never meet.
            bits = np.random.Philox(key=np.array([self._key, row], np.uint64), counter=np.array([0, 0, 0, attempt], np.uint64))
            tokens, is_answer = self._task.draw(np.random.Generator(bits), self._length + self._ahead)
            if (xxhash.xxh3_64_intdigest(tokens) % _HELD_OUT_SHARE == 0) == self._held_out:
                return tokens, is_answer
        raise UserError(f"{self.identity} has too few different rows of {self._length} tokens to hold some out")
