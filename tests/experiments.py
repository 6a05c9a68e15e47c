"""Small experiments for tests, built from the base config without a file."""

import ml_collections

from lcx import config, experiment


def small(**overrides) -> experiment.Experiment:
    """A tiny resolved experiment; keywords are dotted fields with `__` for the dot: small(model__layers=2, pattern=("ring",))."""
    conf = config.base()
    differences = {
        "model.dtype": "float32",
        "sequence.length": 64,
        "mesh.seq": 1,
        "model.dim": 32,
        "model.heads": 4,
        "model.kv_heads": 2,
        "model.head_dim": 8,
        "ffns.gated.width": 48,
        "track.wandb": "disabled",
        "scale": "full",
    } | {name.replace("__", "."): value for name, value in overrides.items()}
    with conf.unlocked():
        conf.layers = ml_collections.ConfigDict(differences.pop("layers", {}))
    for field, value in differences.items():
        config.assign(conf, field, value, origin="test")
    return experiment.resolve(conf, conf.sequence.length)
