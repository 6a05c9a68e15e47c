"""Every field with its default. Blocks and fields come from the `Config` dataclasses of the parts; see `lcx.config.BLOCKS`."""

from lcx import config


def get_config():
    """The config that every experiment starts from."""
    return config.base()
