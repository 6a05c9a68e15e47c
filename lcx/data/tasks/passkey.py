"""Passkey retrieval (Mohtashami and Jaggi 2023, "Landmark Attention", arXiv:2305.16300): a number hidden in filler text."""

import dataclasses

import numpy as np

from lcx.data.tasks.rows import TaskRows
from lcx.data.tokenizers import Bytes
from lcx.registry import UserError

FILLER = (
    b"Rain fell on the roof all morning. ",
    b"A train went by and the windows shook. ",
    b"Nobody had wound the clock for years. ",
    b"The bread was still warm. ",
    b"Two gulls sat on the wall and looked at the sea. ",
    b"She put the letters back into the drawer. ",
    b"It grew dark early that week. ",
    b"The path led down to the mill and ended there. ",
)
NEEDLE = (b"Note the key to the gate: ", b". ")
QUESTION = b" What is the key to the gate? It is "


@dataclasses.dataclass(frozen=True)
class Config:
    """Attributes:
    key_length: digits of the key.
    depth: where the key stands, as a fraction of the filler (0 first, 1 last, moved back to the beginning of a sentence);
      -1 draws it uniformly.
    loss_on: "answers" or "all" labels.
    held_out_rows: size of the held-out set.
    """

    key_length: int = 5
    depth: float = -1.0
    loss_on: str = "answers"
    held_out_rows: int = 64


class Passkey:
    """A row: sentences in random order with "Note the key to the gate: <digits>. " among them, then the question and the digits.

    The vocabulary is the 256 bytes. The answers are the digits at the very end of the row.
    """

    Config = Config
    generated = True
    name = "passkey"
    vocab_size = 256

    def __init__(self, config: Config):
        if config.key_length < 1:
            raise UserError(f"datasets.passkey.key_length={config.key_length} must be at least 1")
        if config.depth != -1 and not 0 <= config.depth <= 1:
            raise UserError(f"datasets.passkey.depth={config.depth} must be from 0 to 1, or -1 for a random depth")
        self.config = config
        self.tokenizer = Bytes()

    def rows(self, **which) -> TaskRows:
        return TaskRows(self, **which)

    def draw(self, random: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        key = bytes(random.integers(ord("0"), ord("9") + 1, size=self.config.key_length, dtype=np.uint8))
        needle, question = NEEDLE[0] + key + NEEDLE[1], QUESTION + key
        room = length - len(needle) - len(question)
        if room < 0:
            raise UserError(f"data.source='passkey' needs rows of at least {length - room} tokens, not {length}")
        chosen = random.integers(len(FILLER), size=room // min(map(len, FILLER)) + 1)
        begins = np.cumsum([0] + [len(FILLER[i]) for i in chosen])
        depth = random.random() if self.config.depth == -1 else self.config.depth
        at = int(begins[np.searchsorted(begins, depth * room, "right") - 1])
        filler = b"".join(FILLER[i] for i in chosen)[:room]
        text = filler[:at] + needle + filler[at:] + question
        is_answer = np.zeros(length, bool)
        is_answer[length - len(key) :] = True
        return np.frombuffer(text, np.uint8).astype(np.int32), is_answer
