"""The options that every data source shares (config block `config.data`)."""

import dataclasses

from lcx.registry import UserError, unknown

PACKINGS = ("concat", "best_fit", "none", "stream")
HELD_OUT = ("documents", "tail")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is read, how it becomes rows and in which order.

    Attributes:
      source: a name in `lcx.data.DATASETS`; `tfds:<name>` and `hf:<name>` name a dataset of a catalogue.
      tokenizer: "bytes", "ids" (token files without a tokenizer), or the path of a tokenizer.json or a SentencePiece .model.
        The tasks have a vocabulary of their own and do not read it.
      cache_dir: where token stores are prepared.
      held_out: "documents" holds out whole documents, those with the lowest hash of their text, so that copies of a text
        fall on one side and neither the tokenizer nor the seed moves it; "tail" holds out the last tokens (for a source
        of one or few documents).
      held_out_fraction: the fraction of the tokens to hold out, 0 <= f < 1. At least one document where f > 0. A task
        has its own count, `held_out_rows`.
      packing: how documents become rows of S tokens.
        "concat": the documents in a row, cut every S tokens; a document may continue in another row.
        "best_fit": documents longer than S are cut in pieces of S; pieces share rows where they fit whole (best fit,
          longest first), the rest of a row is padding.
        "none": one document, or one piece of at most S tokens of it, per row.
        In these three, every piece has its own segment id, and positions restart at 0 with every piece, also where a
        document continues from another row: what the model can see of it begins there. "stream" is "concat" without
        boundaries: one segment, positions 0..S-1, and the last token of a document predicts the first of the next.
        Choose it to exercise a context far longer than the documents.
      seed: order of the rows, and the draws of a task; 0 <= seed < 2**32.
      shuffle: whether training rows come in a new random order in each epoch. Held-out rows always come in order.
    """

    source: str = "stdlib_text"
    tokenizer: str = "bytes"
    cache_dir: str = "data"
    held_out: str = "documents"
    held_out_fraction: float = 0.02
    packing: str = "concat"
    seed: int = 0
    shuffle: bool = True

    def __post_init__(self):
        if self.packing not in PACKINGS:
            raise unknown("data.packing", self.packing, PACKINGS)
        if self.held_out not in HELD_OUT:
            raise unknown("data.held_out", self.held_out, HELD_OUT)
        if not 0 <= self.held_out_fraction < 1:
            raise UserError(f"data.held_out_fraction={self.held_out_fraction} must be at least 0 and below 1")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"data.seed={self.seed} must be at least 0 and below 2**32")
