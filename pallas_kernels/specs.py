"""Attention shapes of real models, as one device sees them: shared by benchmarks, tests and tuning."""

from typing import NamedTuple


class Heads(NamedTuple):
    """H query heads that share G key/value heads of width K."""

    H: int
    G: int
    K: int


# From the published configs; "_tp8" is one device of eight along the mesh axis tensor.
ATTENTION = {
    "llama2_7b": Heads(32, 32, 128),
    "llama3_8b": Heads(32, 8, 128),
    "llama3_70b_tp8": Heads(8, 1, 128),
    "llama3_1b": Heads(32, 8, 64),
    "gemma2_9b": Heads(16, 8, 256),
}
