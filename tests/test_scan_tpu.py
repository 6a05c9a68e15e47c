"""What the TPU kernels of both recurrences share: step sizes against fp64.

`by_numpy` has functions evaluated with exp2 and log2 that are right to the last bit or nearly. XLA's on a CPU are not: exp2 is
exp of a rounded product, and what the logarithm errs by next to 1 is in no proportion to it.
"""

import jax
import numpy as np
import pytest

from lcx.ops.ssd import SsdSpec
from pallas_kernels import scan_tpu, ssd_tpu_chunk

# Steps of 1e-13 to 30; and those that models have.
BEFORE, USUAL = np.linspace(-30, 30, 6001, dtype=np.float32), np.linspace(-8, 2, 6001, dtype=np.float32)
LIMIT = 8e-7


def exact(before):
    return np.logaddexp(0, before.astype(np.float64))


@pytest.fixture
def by_numpy(monkeypatch):
    for module in (scan_tpu, ssd_tpu_chunk):
        monkeypatch.setattr(module, "jnp", np)


@pytest.mark.parametrize("softplus", [scan_tpu.softplus, scan_tpu.quick_softplus])
def test_steps_so_small_that_exp_is_lost_in_one_plus_exp(softplus, by_numpy, monkeypatch):
    found = softplus(BEFORE)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, exact(BEFORE), rtol=LIMIT)
    # The twins: what 1 + exp loses; and an exponent that is rounded.
    monkeypatch.setattr(scan_tpu, "exp", lambda x: np.exp2(np.float32(scan_tpu.LOG2E) * x))
    for found in (np.log(1 + np.exp(BEFORE)), softplus(BEFORE)):
        with pytest.raises(AssertionError):
            np.testing.assert_allclose(found, exact(BEFORE), rtol=2 * LIMIT)


def test_steps_without_a_logarithm_that_is_exact_next_to_one():
    """By XLA on this CPU; the quick one is the twin."""
    np.testing.assert_allclose(jax.jit(scan_tpu.softplus)(USUAL), exact(USUAL), rtol=LIMIT)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(jax.jit(scan_tpu.quick_softplus)(USUAL), exact(USUAL), rtol=3 * LIMIT)


@pytest.mark.parametrize("softplus", [scan_tpu.softplus, scan_tpu.quick_softplus])
def test_steps_of_what_is_far_from_zero(softplus, by_numpy):
    far = np.array([-np.inf, -1e30, -3000.0, -200.0, 200.0, 3000.0, 1e30], np.float32)
    np.testing.assert_array_equal(softplus(far), np.maximum(far, 0))


def test_the_derivative(by_numpy):
    dt, slope = ssd_tpu_chunk.step_sizes(BEFORE, SsdSpec())
    np.testing.assert_allclose(dt, exact(BEFORE), rtol=LIMIT)
    np.testing.assert_allclose(slope, 1 / (1 + np.exp(-BEFORE.astype(np.float64))), rtol=3e-6)
