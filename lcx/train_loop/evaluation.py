"""Held-out loss, perplexity, loss by band of position, and exact match on tasks with known answers."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from lcx.experiment import Experiment
from lcx.registry import UserError
from lcx.train_loop.step import Batch, position_bands


def evaluate(step: Callable[[Any, Batch], dict], params: Any, batches: Iterable[Batch], experiment: Experiment) -> dict[str, Any]:
    """Runs the evaluation step over at most `evaluate.batches` batches and turns sums into means.

    Returns:
      loss (nats per token), perplexity, tokens, by_position [{start, stop, loss, tokens}], and for tasks exact_match and
      token_accuracy.

    Raises:
      UserError: there is no held-out token.
    """
    totals = None
    for _, batch in zip(range(experiment.evaluate.batches), batches, strict=False):
        sums = jax.tree.map(lambda x: np.asarray(x, np.float64), step(params, batch))
        totals = sums if totals is None else jax.tree.map(np.add, totals, sums)
    if totals is None or not totals["weight"]:
        raise UserError(
            f"data.held_out_fraction={experiment.data.held_out_fraction} leaves no held-out sequence of "
            f"sequence.length={experiment.sequence.length} tokens in {experiment.data.source!r}"
        )
    loss = float(totals["loss"] / totals["weight"])
    found: dict[str, Any] = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": int(totals["weight"])}
    bands = position_bands(experiment.sequence.length, experiment.evaluate.buckets)
    found["by_position"] = [
        {"start": start, "stop": stop, "loss": float(total / weight), "tokens": int(weight)}
        for (start, stop), total, weight in zip(bands, totals["band_loss"], totals["band_weight"], strict=True)
        if weight
    ]
    if "answer_rows" in totals and totals["answer_rows"]:
        found["exact_match"] = float(totals["exact_rows"] / totals["answer_rows"])
        found["token_accuracy"] = float(totals["right_tokens"] / totals["answer_tokens"])
    return found
