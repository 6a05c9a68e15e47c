"""What a training computes: the fields of the parts that it uses, by which a checkpoint is recognised."""

import dataclasses
import json
from typing import Any

from lcx.experiment import Experiment

BLOCKS = ("run", "sequence", "model", "block", "loss", "data", "optimizer", "train", "evaluate", "checkpoint", "track")


def identity(experiment: Experiment) -> dict[str, dict[str, Any]]:
    """{"values": field -> value, "defaults": field -> default} of every block and part in use, in JSON's types.

    Parts that the run does not use are left out: a new mixer in the table must not make every checkpoint another training's.
    """
    blocks = {name: getattr(experiment, name) for name in BLOCKS} | {"dataset": experiment.dataset}
    for kind in experiment.pattern:
        for part in ("mixer", "posenc", "ffn"):
            blocks[f"layers.{kind.name}.{part}"] = getattr(kind, f"{part}_config")
    values, defaults = {}, {}
    for name, block in blocks.items():
        prefix = "" if name == "run" else f"{name}."
        for field in dataclasses.fields(block):
            values[prefix + field.name] = getattr(block, field.name)
            defaults[prefix + field.name] = field.default
    for kind in experiment.pattern:
        for part in ("mixer", "posenc", "ffn"):
            values[f"layers.{kind.name}.{part}"] = getattr(kind, part).__name__
    return json.loads(json.dumps({"values": values, "defaults": defaults}))
