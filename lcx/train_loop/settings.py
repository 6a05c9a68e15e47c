"""The training run's own config blocks; the parts of a run read them."""

import dataclasses

WANDB_MODES = ("auto", "online", "offline", "disabled")


@dataclasses.dataclass(frozen=True)
class SequenceConfig:
    """The stream of tokens.

    Attributes:
      length: tokens in one sequence.
      layout: order of the tokens over the `seq` axis: auto, contiguous, zigzag, striped or cyclic. auto takes contiguous on one
        shard, else what spreads the work of most entries of the pattern evenly, contiguous where any does; the others run in the
        layout that spreads theirs, and their hidden states are converted.
    """

    length: int = 1024
    layout: str = "auto"


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop.

    Attributes:
      steps: optimizer steps of the whole run.
      batch: sequences in one optimizer step.
      accumulate: parts into which a step's batch is cut; gradients add up weighted by valid tokens.
      log_every: steps between logged lines.
      max_bad_steps: steps in a row with a non-finite loss or gradient after which the run saves and stops.
    """

    steps: int = 100
    batch: int = 1
    accumulate: int = 1
    log_every: int = 10
    max_bad_steps: int = 5


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Held-out evaluation during training.

    Attributes:
      every: steps between evaluations; 0 only at the end.
      batches: most batches of held-out data.
      buckets: bands of position over which the loss is reported, each twice as long as the one before.
    """

    every: int = 0
    batches: int = 8
    buckets: int = 8


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Saved states.

    Attributes:
      every: steps between checkpoints; 0 only at the end.
      keep: newest checkpoints to keep.
    """

    every: int = 100
    keep: int = 2


@dataclasses.dataclass(frozen=True)
class TrackConfig:
    """Where metrics go besides metrics.jsonl.

    Attributes:
      wandb: auto (what WANDB_MODE says, else online with a key and offline without), online, offline or disabled.
      project: W&B project.
      tensorboard: also write TensorBoard files (needs the extra).
    """

    wandb: str = "auto"
    project: str = "lcx"
    tensorboard: bool = False
