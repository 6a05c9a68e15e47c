"""What the tests of the recurrences share: results by name and comparisons that must also be able to fail."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import interpret
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


def ignores_padding(run, arrays, segments, cotangents, by_token):
    """What is no token has no part in any sum, even where it is not a number; and what it gets is 0."""
    padding = segments == 0
    fill = lambda x: np.where(padding.reshape(padding.shape + (1,) * (x.ndim - 2)), np.nan, x).astype(x.dtype)
    filled = {name: fill(x) if name in by_token else x for name, x in arrays.items()}
    with interpret.interpreted():
        expected, actual = run(arrays, segments, cotangents), run(filled, segments, cotangents)
    for name, x in actual.items():
        np.testing.assert_array_equal(x, expected[name], err_msg=name)
        if name == "y" or name[1:] in by_token:
            assert not np.asarray(x)[padding].any(), name
            assert np.asarray(x)[~padding].any(), name


def part_of(x, part, dim=1):
    return x if x is None else x[(slice(None),) * dim + (part,)]


def compare_summaries(kernel, definition, inputs, spec, dy, other_inputs):
    """What a backend says a stretch does to a state, and to a gradient: equal to another's, and not with other inputs. The first
    row has documents that start inside, the second none."""
    both = lambda backend: jax.jit(
        lambda inputs, dy: (backend.summary(inputs, spec=spec), backend.reverse_summary(inputs, dy, spec=spec)),
        compiler_options=QUICK,
    )
    expected, run = both(definition)(inputs, dy), both(kernel)
    with interpret.interpreted():
        actual, other = run(inputs, dy), run(other_inputs, dy)
    assert np.isinf(expected[0].elapsed[0]).all() and np.isfinite(expected[0].elapsed[1]).all()
    for got, wrong, right in zip(actual, other, expected, strict=True):
        np.testing.assert_array_equal(np.isinf(got.elapsed), np.isinf(right.elapsed))
        assert_close(got.elapsed[1], right.elapsed[1])
        assert_close(got.state, right.state, gradient=True)
        with pytest.raises(AssertionError):
            assert_close(wrong.state, right.state, gradient=True)


def compare_over_devices(op, arrays, segments, dy, whole, parts, implementation):
    """Summaries, states passed between devices, and gradients, with every mesh axis manual; and a lost state would be seen."""

    def results(arrays, segments, mesh, implementation):
        scan = functools.partial(op, mesh=mesh, segments_BS=segments, implementation=implementation)
        y, pull = jax.vjp(lambda arrays: scan(**arrays), arrays)
        return dict(y=y) | {f"d{name}": x for name, x in pull(jnp.asarray(dy))[0].items()}

    def on(mesh, implementation, segments):
        with jax.set_mesh(mesh):
            return jax.jit(functools.partial(results, mesh=mesh, implementation=implementation))(arrays, segments)

    expected = on(whole, "reference", segments)
    with interpret.interpreted():
        actual = on(parts, implementation, segments)
    compare(actual, expected)
    # The twin: where no state is passed on, it is as if a document began on every device.
    device_S = np.arange(segments.shape[1]) * parts.size // segments.shape[1]
    lost = on(whole, "reference", np.where(segments == 0, 0, segments + (segments.max() + 1) * device_S).astype(np.int32))
    for name in ("y", *(name for name in expected if name.startswith("ddt"))):
        with pytest.raises(AssertionError):
            assert_close(actual[name], lost[name], gradient=name != "y")
