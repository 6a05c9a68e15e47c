"""Static and traced descriptions that every implementation of an operation shares: what attends to what, in which order."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Mask:
    """Which keys a query may attend to. Static and hashable.

    With i the order of a query and j that of a key (their index in the row, never the rotary position): j is visible to
    i iff both are of the same non-zero segment and -right <= i - j <= left; `causal` adds j <= i. The first
    `sink_tokens` tokens of each document stay visible whatever the window says (causality still holds).

    Attributes:
      causal: no query sees a later key.
      window: None for unlimited, or (left, right) in tokens; None on either side is unlimited on that side.
        Hugging Face's sliding_window=W is (W - 1, 0).
      sink_tokens: how many leading tokens of a document the window never hides.
    """

    causal: bool = True
    window: tuple[int | None, int | None] | None = None
    sink_tokens: int = 0

    def __post_init__(self):
        for side in self.window or ():
            if side is not None and side < 0:
                raise ValueError(f"Mask.window={self.window}: both sides count tokens and must be >= 0 or None")
        if self.sink_tokens < 0:
            raise ValueError(f"Mask.sink_tokens={self.sink_tokens} must be >= 0")

    @property
    def left(self) -> int | None:
        """How many earlier tokens a query sees; None is unlimited."""
        return None if self.window is None else self.window[0]

    @property
    def right(self) -> int | None:
        """How many later tokens a query sees; None is unlimited."""
        if self.causal:
            return 0
        return None if self.window is None else self.window[1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Runs:
    """The order of the tokens of one shard: runs `start + step * arange(length)`, one after another.

    A contiguous shard is one run, a zigzag shard two, a striped one a single run with step P, a cyclic one a run for each block.
    `starts` is traced (it depends on the device); the rest is static, so one compiled kernel serves every step of a ring.

    Attributes:
      starts: int32, one entry a run.
      length: tokens in each run.
      step: distance in order between neighbouring tokens of a run.
    """

    starts: jax.Array
    length: int = dataclasses.field(metadata=dict(static=True))
    step: int = dataclasses.field(default=1, metadata=dict(static=True))

    @property
    def count(self) -> int:
        """Number of runs."""
        return self.starts.shape[0]

    @property
    def size(self) -> int:
        """Number of tokens."""
        return self.count * self.length

    def halves(self) -> tuple["Runs", "Runs"]:
        """The first half of the runs and the rest; of one run, of its tokens."""
        if self.count > 1:
            half = self.count // 2
            return Runs(self.starts[:half], self.length, self.step), Runs(self.starts[half:], self.length, self.step)
        half = self.length // 2
        return Runs(self.starts, half, self.step), Runs(self.starts + self.step * half, self.length - half, self.step)

    def order(self) -> jax.Array:
        """int32 order of every token, `size` of them."""
        offsets = self.step * jnp.arange(self.length, dtype=jnp.int32)
        return (self.starts[:, None].astype(jnp.int32) + offsets[None, :]).reshape(self.size)


def contiguous(length: int, start: int | jax.Array = 0) -> Runs:
    """One run of `length` tokens from `start`."""
    return Runs(jnp.asarray(start, jnp.int32).reshape(1), length)


class Segments(NamedTuple):
    """Document ids beside the tokens, as an attention backend receives them.

    Attributes:
      q_BS: int32 segment of each query; 0 is padding.
      k_BT: int32 segment of each key; 0 is padding.
      sink_BT: bool, whether a key is one of the first `Mask.sink_tokens` tokens of its document; None without sinks.
    """

    q_BS: jax.Array | None
    k_BT: jax.Array | None
    sink_BT: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """What an attention backend needs to know statically.

    Attributes:
      mask: visibility.
      scale: factor on q.k before the softmax.
      softcap: None, or c for c * tanh(score / c).
      whole: queries and keys are whole rows, in order from token 0, and nothing but the output is wanted: no logsumexp, no
        learned sink, nothing to merge with.
    """

    mask: Mask
    scale: float
    softcap: float | None = None
    whole: bool = False
