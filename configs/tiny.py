"""The smallest run: two layers of ring attention on real text.

python -m lcx.train --config configs/tiny.py
"""

from configs import base


def get_config():
    """2 layers, 512 tokens."""
    config = base.get_config()
    config.name = "tiny"
    config.sequence.length = 512
    config.model.dtype = "float32"
    config.train.steps = 60
    config.train.batch = 2
    config.optimizer.learning_rate = 5e-3
    config.optimizer.warmup_steps = 10
    return config
