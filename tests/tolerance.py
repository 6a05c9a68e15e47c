"""The one tolerance table. A change here needs a written reason beside the number."""

import jax
import numpy as np

VALUES = {"float32": 1e-6, "bfloat16": 8e-3}
GRADIENTS = {"float32": 5e-6, "bfloat16": 2e-2}


def rms_ratio(actual, expected) -> float:
    """RMS of the difference over RMS of the expected array; 0 when both vanish; inf when the actual is not finite."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if not np.isfinite(actual).all():
        return float("inf")
    error, size = np.sqrt(np.mean((actual - expected) ** 2)), np.sqrt(np.mean(expected**2))
    return float(error / size) if size else float(error)


def assert_close(actual, expected, *, name: str = "value", gradient: bool = False, dtype: str = "float32") -> None:
    """Fails, naming the array, when the RMS ratio is over the table's limit."""
    limit = (GRADIENTS if gradient else VALUES)[dtype]
    ratio = rms_ratio(actual, expected)
    assert ratio <= limit, f"{name}: RMS ratio {ratio:.3g} is over {limit:.3g}"


def assert_trees_close(actual, expected, *, gradient: bool = False, dtype: str = "float32") -> None:
    """`assert_close` on every leaf, by its path."""
    jax.tree_util.tree_map_with_path(
        lambda path, a, e: assert_close(a, e, name=jax.tree_util.keystr(path), gradient=gradient, dtype=dtype), actual, expected
    )
