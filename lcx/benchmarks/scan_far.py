"""Is a recurrence right where a row has more than 2^31 numbers: the row in one call against the same row in pieces.

Each piece has fewer, and states are passed by hand: the final state of one is the initial state of the next, and the gradient of
an initial state that of the final state before it. They are compared piece by piece, and no array is widened whole.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lcx.benchmarks.numerics import judged
from lcx.benchmarks.scan_cases import Scan, Ssd
from lcx.benchmarks.scan_numerics import limits
from lcx.planning.memory import compiled_bytes, memory_stats, shortfall
from lcx.registry import UserError

PIECES = 3
# Pieces hold the same tokens, and an offset without its upper bits has to lead to others: no power of two is a multiple of their
# length.
TOKENS = PIECES * 393_241


def compare(case: Scan | Ssd, implementation: str) -> dict[str, Any]:
    """A row as `scan_numerics.compare` has them; it is refused where the device's memory does not suffice."""
    row = dict(case=f"{case.name}, {case.dtype}, whole and in {PIECES}", S=case.S, implementation=implementation)
    names = ("y", "final", *(f"d{name}" for name in jax.eval_shape(lambda: of_piece(case))[0]))
    return row | judged(functools.partial(errors, case, implementation), limits(case.dtype, names))


def whole(case: Scan | Ssd, implementation: str) -> jax.stages.Compiled:
    """Both passes of the row in one call, compiled: what memory they take is known before they run.

    Raises:
      UserError: the implementation refuses; they do not fit the device's memory, or the device does not say what it has.
    """
    device = jax.devices()[0]
    if not (memory_stats(device) or {}).get("bytes_limit"):
        raise UserError(f"not tried: {device.device_kind} does not say how much memory it has")
    program = jax.jit(passes(case, implementation)).lower(*jax.eval_shape(lambda: arguments(case))).compile()
    if (short := shortfall(compiled_bytes(program), device)) is not None:
        raise UserError(f"not tried: it {short}")
    return program


def passes(case: Scan | Ssd, implementation: str) -> Callable:
    """(arrays, dy, d(final state)) -> y, final, and d of every array, by name."""
    solve = case.solver(implementation)

    def run(arrays, dy, dfinal):
        (y, final), pull = jax.vjp(solve, arrays)
        return dict(y=y, final=final) | {f"d{name}": x for name, x in pull((dy, dfinal))[0].items()}

    return run


def arguments(case: Scan | Ssd) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
    """What `passes` takes, of a row of pieces that hold the same tokens."""
    arrays, dy, dfinal = of_piece(case)
    repeated = lambda x: jnp.concatenate([x] * PIECES, axis=1)
    return {name: repeated(x) if by_token(name) else x for name, x in arrays.items()}, repeated(dy), dfinal


def of_piece(case: Scan | Ssd) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
    """The same of one piece."""
    piece = dataclasses.replace(case, S=case.S // PIECES)
    arrays, (name, shape) = piece.inputs(), case.state
    tokens = next(iter(arrays.values()))
    initial, dfinal = (jax.random.normal(jax.random.key(100 + i), shape) for i in range(2))
    return arrays | {name: initial}, jax.random.normal(jax.random.key(102), tokens.shape, tokens.dtype), dfinal


def by_token(name: str) -> bool:
    """Whether an array, or its gradient, goes by token."""
    return name == "y" or name.rpartition("_")[2].startswith("BS")


def errors(case: Scan | Ssd, implementation: str) -> dict[str, float]:
    """By result: RMS of the difference over RMS, at worst of all pieces.

    Raises:
      UserError: see `whole`.
    """
    found = whole(case, implementation)(*arguments(case))
    arrays, dy, dfinal = of_piece(case)
    (state, _), run = case.state, jax.jit(passes(case, implementation))
    solve, starts = jax.jit(case.solver(implementation)), [arrays[case.state[0]]]
    for _ in range(PIECES - 1):
        starts.append(solve(arrays | {state: starts[-1]})[1])
    worst, sums, size = {}, {}, case.S // PIECES
    for piece in reversed(range(PIECES)):
        expected = run(arrays | {state: starts[piece]}, dy, dfinal)
        dfinal, final = expected.pop(f"d{state}"), expected.pop("final")
        if piece == PIECES - 1:
            worst["final"] = ratio(found["final"], final)
        for name, x in expected.items():
            if by_token(name):
                worst[name] = jnp.maximum(worst.get(name, 0.0), ratio(found[name], x, piece * size))
            else:
                sums[name] = sums.get(name, 0.0) + x
    worst |= {name: ratio(found[name], x) for name, x in (sums | {f"d{state}": dfinal}).items()}
    return {name: float(error) for name, error in worst.items()}


@functools.partial(jax.jit, static_argnames="start")
def ratio(actual: jax.Array, expected: jax.Array, start: int | None = None) -> jax.Array:
    """RMS of the difference over RMS of the expected array; with `start`, of as many tokens from there on."""
    if start is not None:
        actual = lax.slice_in_dim(actual, start, start + expected.shape[1], axis=1)
    actual, expected = actual.astype(jnp.float32), expected.astype(jnp.float32)
    return jnp.sqrt(jnp.mean((actual - expected) ** 2) / jnp.mean(expected**2))
