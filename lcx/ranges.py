"""Which numbers a field of the run's own blocks may have; those of the parts are checked by the parts."""

import math
from typing import NamedTuple


class Range(NamedTuple):
    """The finite values from `low` to `high`, None for no limit; without `low` itself if `above`, without `high` if `below`."""

    low: float
    high: float | None = None
    above: bool = False
    below: bool = False

    def refuses(self, value: float) -> str | None:
        """What a value must be and is not; None for one in range."""
        fits = math.isfinite(value) and (value > self.low if self.above else value >= self.low)
        if fits and (self.high is None or (value < self.high if self.below else value <= self.high)):
            return None
        lower = f"{'above' if self.above else 'at least'} {self.low}"
        upper = " and finite" if self.high is None else f" and {'below' if self.below else 'at most'} {self.high}"
        return lower + (upper if self.high is not None or not math.isfinite(value) else "")


POSITIVE = Range(0, above=True)

# Field -> its range. A field left at None is not compared.
RANGES: dict[str, Range] = {
    "run.seed": Range(0, 2**32, below=True),
    "sequence.length": Range(1, 2**30),  # to where rotary angles are exact
    "model.layers": Range(1),
    "model.dim": Range(1),
    "model.heads": Range(1),
    "model.kv_heads": Range(1),
    "model.head_dim": Range(1),
    "model.vocab": Range(1),
    "model.logit_softcap": POSITIVE,
    "model.norm_eps": POSITIVE,
    "posencs.rope.theta": POSITIVE,
    "block.token_chunk": Range(0),
    "loss.chunk": Range(1),
    "loss.z_loss": Range(0),
    "loss.label_smoothing": Range(0, 1, below=True),
    "optimizer.learning_rate": POSITIVE,
    "optimizer.beta1": Range(0, 1, below=True),
    "optimizer.beta2": Range(0, 1, below=True),
    "optimizer.eps": Range(0),
    "optimizer.weight_decay": Range(0),
    "optimizer.clip_norm": Range(0),
    "optimizer.warmup_steps": Range(0),
    "optimizer.decay_fraction": Range(0, 1),
    "optimizer.final_fraction": Range(0, 1),
    "train.steps": Range(1),
    "train.batch": Range(1),
    "train.accumulate": Range(1),
    "train.log_every": Range(1),
    "train.max_bad_steps": Range(1),
    "evaluate.every": Range(0),
    "evaluate.batches": Range(1),
    "evaluate.buckets": Range(1),
    "checkpoint.every": Range(0),
    "checkpoint.keep": Range(1),
}
