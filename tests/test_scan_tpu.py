"""What the TPU kernels of both recurrences share: step sizes against fp64.

Evaluated by numpy, whose exp2 and log2 are right to the last bit or nearly; XLA's exp2 on a CPU is exp of a rounded product.
"""

import numpy as np
import pytest

from lcx.ops.ssd import SsdSpec
from pallas_kernels import scan_tpu, ssd_tpu_chunk

# Steps of 1e-13 to 30.
BEFORE = np.linspace(-30, 30, 6001, dtype=np.float32)
EXACT = np.logaddexp(0, BEFORE.astype(np.float64))
LIMIT = 8e-7


@pytest.fixture(autouse=True)
def by_numpy(monkeypatch):
    for module in (scan_tpu, ssd_tpu_chunk):
        monkeypatch.setattr(module, "jnp", np)


def test_steps_so_small_that_exp_is_lost_in_one_plus_exp():
    found = scan_tpu.softplus(BEFORE)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, EXACT, rtol=LIMIT)


def test_simpler_ways_are_worse(monkeypatch):
    """The twins: what 1 + exp loses; and an exponent that is rounded."""
    monkeypatch.setattr(scan_tpu, "exp", lambda x: np.exp2(np.float32(scan_tpu.LOG2E) * x))
    for found in (np.log(1 + np.exp(BEFORE)), scan_tpu.softplus(BEFORE)):
        with pytest.raises(AssertionError):
            np.testing.assert_allclose(found, EXACT, rtol=2 * LIMIT)


def test_steps_of_what_is_far_from_zero():
    far = np.array([-np.inf, -1e30, -3000.0, -200.0, 200.0, 3000.0, 1e30], np.float32)
    np.testing.assert_array_equal(scan_tpu.softplus(far), np.maximum(far, 0))


def test_the_derivative():
    dt, slope = ssd_tpu_chunk.step_sizes(BEFORE, SsdSpec())
    np.testing.assert_allclose(dt, EXACT, rtol=LIMIT)
    np.testing.assert_allclose(slope, 1 / (1 + np.exp(-BEFORE.astype(np.float64))), rtol=3e-6)
