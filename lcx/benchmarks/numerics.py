"""Is it right, before it is fast: every implementation against the reference in fp32, values and gradients."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lcx.benchmarks.cases import Case, pullback, solver
from lcx.benchmarks.timing import reason
from lcx.ops.types import Mask
from lcx.registry import UserError

# RMS of the difference over RMS of the reference. Operands, weights and d(score) are rounded to bf16 once each, 2^-9 relative.
LIMITS = {"o": 8e-3, "dq": 2e-2, "dk": 2e-2, "dv": 2e-2}


def checked_cases(S: int = 512, B: int = 2) -> tuple[Case, ...]:
    """What is compared: every feature that is timed, and padding."""
    heads = dict(B=B, S=S, H=4, G=2)
    return (
        Case("causal, grouped", **heads, K=64),
        Case("causal, grouped", **heads, K=128),
        Case("causal", B=B, S=S, H=2, G=2, K=256),
        Case("full", **heads, K=128, mask=Mask(causal=False)),
        Case("window", **heads, K=128, mask=Mask(window=(S // 4, 0))),
        Case("packed", **heads, K=128, documents=(S // 4,) * 4),
        Case("packed, padding", **heads, K=64, documents=(S // 2 - 5, S // 4 + 3, S // 8)),
    )


def results(case: Case, implementation: str, inputs: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    """o, dq, dk, dv in fp32.

    Raises:
      UserError: it refuses.
    """
    solve, _ = solver(case, implementation)
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    found = jax.jit(solve)(q, k, v), *pullback(solve, q, k, v)(inputs["do"])
    return {name: np.asarray(x, np.float32) for name, x in zip(LIMITS, found, strict=True)}


def compare(cases: tuple[Case, ...], implementations: tuple[str, ...]) -> list[dict]:
    """One row for each case and implementation: its status ("ok", "wrong", "refused", "failed"), the errors, the reason."""
    rows = []
    for case in cases:
        inputs = case.inputs()
        exact = dataclasses.replace(case, dtype="float32")
        with jax.default_matmul_precision("highest"):
            expected = results(exact, "reference", {name: x.astype(jnp.float32) for name, x in inputs.items()})
        for name in implementations:
            row = dict(case=case.name, K=case.K, S=case.S, implementation=name)
            row |= judged(functools.partial(errors, functools.partial(results, case, name, inputs), expected), LIMITS)
            if row["status"] == "ok":
                row["reason"] = solver(case, name)[1]
            rows.append(row)
    return rows


def errors(find: Callable[[], dict[str, np.ndarray]], expected: dict[str, np.ndarray]) -> dict[str, float]:
    """How far off is what is found."""
    found = find()
    return {name: rms_ratio(found[name], expected[name]) for name in expected}


def judged(find: Callable[[], dict[str, float]], limits: dict[str, float]) -> dict:
    """status, errors and reason of one implementation, whose errors `find` finds."""
    # One that does not even run is a result as well, and the others go on.
    try:
        found = find()
    except UserError as refused:
        return dict(status="refused", errors={}, reason=reason(refused))
    except Exception as error:
        return dict(status="failed", errors={}, reason=reason(error))
    wrong = [name for name in limits if not found[name] <= limits[name]]
    why = f"{', '.join(wrong)} over {', '.join(f'{limits[name]:g}' for name in wrong)}" if wrong else ""
    return dict(status="wrong" if wrong else "ok", errors=found, reason=why)


def rms_ratio(actual: np.ndarray, expected: np.ndarray) -> float:
    """RMS of the difference over RMS of the expected array."""
    actual, expected = actual.astype(np.float64), expected.astype(np.float64)
    return float(np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2)))


def described(row: dict) -> str:
    """A row as a line of text."""
    errors = "  ".join(f"{name} {error:.1e}" for name, error in row["errors"].items())
    return f"{row['implementation']:<12}{row['case']:<18}{row['K']:>4}  {row['status']:<8} {errors}  {row['reason']}".rstrip()
