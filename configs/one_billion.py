"""A model of 1.0B parameters and its training, one sequence a step; the long-context configs take it and say what they change."""

from configs import base


def get_config():
    """16 layers of width 2048, 16 query and 8 key/value heads of 128."""
    config = base.get_config()
    config.name = "one_billion"
    config.model.update(layers=16, dim=2048, heads=16, kv_heads=8, head_dim=128)
    config.ffns.gated.width = 8192
    config.data.packing = "stream"
    config.data.held_out_fraction = 0.1  # of the default text: a row of a million tokens
    config.train.update(steps=10_000, batch=1)
    config.optimizer.update(learning_rate=3e-4, warmup_steps=500)
    config.checkpoint.every = 500
    config.evaluate.update(every=500, batches=4)
    return config
