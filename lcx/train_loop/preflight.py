"""What can be said of a run before anything is compiled: mistakes that would train on nonsense, and rows that hold little."""

from collections.abc import Iterator

from lcx.data import load_source
from lcx.data.loader import Loader
from lcx.experiment import Experiment
from lcx.pretrained import Pretrained
from lcx.registry import UserError
from lcx.train_loop.state import ModelPlan


def check_objective(experiment: Experiment) -> None:
    """Raises UserError where a layer sees the token that it is trained to predict."""
    for kind in experiment.pattern:
        if kind.mixer.caps.bidirectional and not kind.mixer_config.causal:
            raise UserError(f"layer {kind.name!r}: causal=False sees the next token, which is what training predicts; use True")


def open_pretrained(experiment: Experiment, plan: ModelPlan) -> Pretrained:
    """The checkpoint that `init_from` names.

    Raises:
      UserError: it is another model, or its tokens are not those of the data.
    """
    e, vocabulary = experiment, plan.sizes.V
    if e.data.tokenizer == "bytes" and not load_source(e.data.source)[0].generated and vocabulary != 256:
        raise UserError(
            f"data.tokenizer='bytes': the checkpoint init_from={e.run.init_from!r} has {vocabulary} tokens of another kind; "
            f"name its tokenizer, e.g. --config.data.tokenizer={e.run.init_from}/tokenizer.json"
        )
    return Pretrained(e.run.init_from, e, plan)


def padding_warnings(experiment: Experiment, loaders: dict[str, Loader]) -> Iterator[str]:
    """A line for every split whose rows are mostly padding: it costs as much as text, and nothing is learned of its positions."""
    e = experiment
    for split, loader in loaders.items():
        if loader.fill < 0.5:
            rows = f"{split} rows of {e.sequence.length:,} tokens are {100 * loader.fill:.0f} % full"
            data = f"data.packing={e.data.packing} and data.held_out_fraction={e.data.held_out_fraction}"
            yield f"warning: {rows}: {e.data.source} has too little text for {data}"
