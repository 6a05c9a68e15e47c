"""Is a recurrence right, before it is fast: every implementation against the reference in fp32, states and gradients too."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcx.benchmarks.cases import pullback
from lcx.benchmarks.numerics import errors, judged
from lcx.benchmarks.scan_cases import Scan, Ssd

# RMS of the difference over RMS of the reference, by dtype: values, gradients, the final state, which is fp32 throughout. Ten
# times the tests' for fp32: a device's exp and log are one instruction each.
LIMITS = {"float32": (1e-5, 5e-5, 1e-5), "bfloat16": (8e-3, 2e-2, 1e-5)}


def limits(dtype: str, names: Iterable[str]) -> dict[str, float]:
    """The limit of each result: `y`, `final`, the gradients."""
    value, gradient, state = LIMITS[dtype]
    return {name: {"y": value, "final": state}.get(name, gradient) for name in names}


def values(case: Scan | Ssd, implementation: str, inputs: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    """Output, final state and the gradient of every input, in fp32; for fixed gradients of output and state."""
    solve = case.solver(implementation)
    found = jax.jit(solve)(inputs)
    shapes = {name: x.shape for name, x in zip(("y", "final"), found, strict=True)}
    dy, dfinal = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes.values()))
    (gradients,) = pullback(solve, inputs)((dy.astype(found[0].dtype), dfinal))
    named = dict(zip(shapes, found, strict=True)) | {f"d{name}": x for name, x in gradients.items()}
    return {name: np.asarray(x, np.float32) for name, x in named.items()}


def compare(cases: Sequence[Scan | Ssd], implementations: Sequence[str]) -> list[dict[str, Any]]:
    """One row for each case and implementation, as `numerics.compare` has them."""
    rows = []
    for case in cases:
        inputs = case.inputs()
        exact = {name: x.astype(jnp.float32) for name, x in inputs.items()}
        with jax.default_matmul_precision("highest"):
            expected = values(dataclasses.replace(case, dtype="float32"), "reference", exact)
        for name in implementations:
            row = dict(case=f"{case.name}, {case.dtype}", S=case.S, implementation=name)
            find = functools.partial(errors, functools.partial(values, case, name, inputs), expected)
            rows.append(row | judged(find, limits(case.dtype, expected)))
    return rows
