"""Rotary angles against fp64, and the algebra that makes them relative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.posenc.rope import Rope, frequencies, llama3_scaling, rotations
from lcx.registry import UserError
from tests.tolerance import assert_close

POSITIONS = [0, 1, 1023, 1024, 4096, 131_071, 2**20 - 1, 2**20, 2**21 - 1, 2**27 + 12345, 2**30 - 1]


def exact(positions, frequency):
    """fp64 cosine and sine; the product is exact enough because position * frequency < 2^31 radians of 2^-53 each."""
    angle = np.remainder(np.asarray(positions, np.float64)[:, None] * frequency, 2 * np.pi)
    return np.cos(angle), np.sin(angle)


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_angles_are_exact_to_two_to_the_thirty(theta):
    rope = Rope(Rope.Config(theta=theta), 128)
    cos, sin = rotations(jnp.asarray([POSITIONS], jnp.int32), rope.tables)
    for ours, true in zip((cos[0], sin[0]), exact(POSITIONS, frequencies(128, theta)), strict=True):
        assert np.abs(np.asarray(ours, np.float64) - true).max() < 4e-7


def test_fp32_angles_would_fail_that_test():
    angle = np.float32(2**21 - 1) * frequencies(128, 10_000.0).astype(np.float32)
    assert np.abs(np.cos(angle.astype(np.float64)) - exact([2**21 - 1], frequencies(128, 10_000.0))[0]).max() > 1e-2


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_distance_only(interleaved):
    rope = Rope(Rope.Config(interleaved=interleaved), 16)
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))
    score = lambda i, j: jnp.sum(rope.rotate(q, jnp.full((1, 1), i)) * rope.rotate(k, jnp.full((1, 1), j)))
    assert_close(score(2**29 + 107, 2**29 + 100), score(7, 0), name="score", gradient=True)
    assert abs(score(8, 0) - score(7, 0)) > 1e-3


def test_interleaved_is_a_permutation_of_halves():
    x = jax.random.normal(jax.random.key(0), (1, 5, 2, 8))
    positions = jnp.arange(5)[None]
    order = np.r_[0:8:2, 1:8:2]
    pairs = Rope(Rope.Config(interleaved=True), 8).rotate(x, positions)
    halves = Rope(Rope.Config(), 8).rotate(x[..., order], positions)
    np.testing.assert_array_equal(pairs[..., order], halves)


def test_partial_rotary_leaves_the_rest():
    x = jax.random.normal(jax.random.key(0), (1, 3, 1, 8))
    y = Rope(Rope.Config(fraction=0.5), 8).rotate(x, jnp.asarray([[5, 6, 7]]))
    np.testing.assert_array_equal(y[..., 4:], x[..., 4:])
    assert np.abs(np.asarray(y - x)[..., :4]).max() > 0.1


def test_llama3_scaling_keeps_fast_and_stretches_slow_frequencies():
    frequency = frequencies(128, 500_000.0)
    scaled = llama3_scaling(frequency, 8.0, 1.0, 4.0, 8192)
    np.testing.assert_allclose(scaled[0], frequency[0])
    np.testing.assert_allclose(scaled[-1], frequency[-1] / 8)


def test_odd_fraction_is_refused():
    with pytest.raises(UserError, match=r"posencs.rope.fraction=0.4"):
        Rope(Rope.Config(fraction=0.4), 8)
