"""What the tests of the recurrences share: results by name, comparisons that must also be able to fail, cuts into shards."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.ops.recurrence import apply, compose
from tests.tolerance import assert_close

QUICK = {"xla_backend_optimization_level": 0}


def normal(random, *shape):
    return random.normal(size=shape).astype(np.float32)


def packed_segments(random, B, S, documents=4):
    """Rows of a few documents, the first also with padding inside, all with padding behind where they are long enough."""
    segments = np.sort(random.integers(1, documents + 1, (B, S)), axis=1).astype(np.int32)
    segments[:, S - S // 8 :] = 0
    starts = np.flatnonzero(np.diff(segments[0], prepend=segments[0, 0]))
    if len(starts) > 1:
        segments[0, starts[0] - 1] = 0  # the last token of a document
    return segments


def runner(op, **options):
    """(arrays by name, segments or None, cotangents) -> {y, final, d of every array}, compiled."""

    def results(arrays, segments_BS, cotangents):
        def objective(arrays):
            outputs = op(**arrays, **(options if segments_BS is None else options | dict(segments_BS=segments_BS)))
            total = sum(jnp.sum(out.astype(jnp.float32) * on) for out, on in zip(outputs, cotangents))
            return total, dict(zip(("y", "final"), outputs))

        gradients, values = jax.grad(objective, has_aux=True)(arrays)
        return values | {f"d{name}": x for name, x in gradients.items()}

    return jax.jit(results, compiler_options=QUICK)


def compare(actual, expected, dtype="float32"):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if value.size == 0:  # the rows before a convolution of width 1
            assert actual[name].shape == value.shape
            continue
        assert_close(actual[name], value, name=name, gradient=name.startswith("d"), dtype=dtype)


def breaks(run, arrays, segments, cotangents, expected):
    """The twin: whichever input is changed, the comparison must notice."""
    changed = [(arrays | {name: x * np.float32(1.001)}, segments, cotangents) for name, x in arrays.items()]
    changed += [] if segments is None else [(arrays, np.roll(segments, 1, axis=1), cotangents)]
    changed += [(arrays, segments, (cotangents[0], cotangents[1] * np.float32(1.001)))]
    for arguments in changed:
        with pytest.raises(AssertionError):
            compare(run(*arguments), expected)


def part_of(x, part, dim=1):
    return x if x is None else x[(slice(None),) * dim + (part,)]


def over_shards(backend, spec, shards, rate, cotangents, initial):
    """A scan over shards in a row, as devices would do it: summaries, prefix, scan; backward, the mirror image.

    Returns:
      ([y], final state, [gradients], gradient of the initial state).
    """
    call = lambda f: jax.jit(functools.partial(f, spec=spec), compiler_options=QUICK)
    summary, forward, backward, reverse = map(call, (backend.summary, backend.forward, backend.backward, backend.reverse_summary))
    maps = [summary(shard) for shard in shards]
    prefix, states = None, []
    for stretch in maps:
        states.append(initial if prefix is None else apply(prefix, initial, rate))
        prefix = stretch if prefix is None else compose(prefix, stretch, rate)
    done = [forward(shard, state) for shard, state in zip(shards, states)]
    back = [reverse(shard, dy) for shard, dy in zip(shards, cotangents[0])]
    after, suffix = [], None
    for stretch in back[::-1]:
        after.append(cotangents[1] if suffix is None else apply(suffix, cotangents[1], rate))
        suffix = stretch if suffix is None else compose(suffix, stretch, rate)
    grads = [backward(shard, d[2], dy, g) for shard, d, dy, g in zip(shards, done, cotangents[0], after[::-1])]
    return [d[0] for d in done], done[-1][1], [g[0] for g in grads], grads[0][1]
