"""Which mesh axes a value differs along, as `jax.shard_map(check_vma=True)` tracks it.

A loop's state has to differ along the same axes from its first turn on, and zeros made on every device alike do not.
"""

from typing import Any

import jax
from jax import lax


def alike(tree: Any, *like: Any) -> Any:
    """The same values, of a type that differs along every axis along which `like` does; outside a manual region as they are."""
    axes = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(like)))

    def cast(x: jax.Array) -> jax.Array:
        missing = tuple(axes - jax.typeof(x).manual_axis_type.varying)
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)
