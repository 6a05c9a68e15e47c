"""The Triton kernels of recurrences and convolution on arrays of more than 2^31 numbers: the last channels of the last tokens."""

import jax.numpy as jnp
import numpy as np
import pytest

from lcx.ops import causal_conv, selective_scan, ssd
from lcx.ops.recurrence import Marks
from pallas_kernels import causal_conv_triton, selective_scan_triton, selective_scan_triton_cut, ssd_triton, ssd_triton_cut
from tests.last_program import Lazy, compare_far
from tests.recurrences import normal
from tests.test_selective_scan_triton import SHORT

WIDTH = 2**15  # channels
FRONT, TAIL = 2**16, 19  # tokens in front of the last segment, and in it: 2^31 numbers and more
SEGMENT = 2**15


def by_token(front, *shapes):
    """Arrays B S ... of zeros but for the last tokens, which are always the same."""
    random, found = np.random.default_rng(0), []
    for shape in shapes:
        found.append(np.zeros((1, front + TAIL, *shape), jnp.bfloat16).view(Lazy))
        found[-1][:, front:] = normal(random, 1, TAIL, *shape)
    return found


def documents(front):
    """One starts among the last tokens, of which one is padding."""
    reset, real = np.zeros((1, front + TAIL), bool), np.ones((1, front + TAIL), bool)
    reset[:, front + 17], real[:, front + 3] = True, False
    return Marks(jnp.asarray(reset), jnp.asarray(real))


def states_in_front(*shape):
    """Zeros but for the last."""
    found = np.zeros(shape, np.float32)
    found[:, -1:] = normal(np.random.default_rng(1), *found[:, -1:].shape)
    return found


# The selective scan.


@pytest.fixture
def scan_cut(monkeypatch):
    """Two segments in front of the last tokens; one block of channels a program."""
    for name, size in (SHORT | dict(MOST_CHANNELS=1)).items():
        monkeypatch.setattr(selective_scan_triton_cut, name, size)
    segments = lambda self, *_: (SEGMENT, -(-self.S // SEGMENT))
    monkeypatch.setattr(selective_scan_triton_cut.Cut, "segments", segments)


def scan_inputs(front, N=2):
    random = np.random.default_rng(2)
    u, dt, z, dy, B, C = by_token(front, *[(WIDTH,)] * 4, (N,), (N,))
    channel = lambda: jnp.asarray(normal(random, WIDTH))
    A = jnp.asarray(-np.exp(normal(random, WIDTH, N)))
    return selective_scan.Inputs(u, dt, A, jnp.asarray(B), jnp.asarray(C), channel(), z, channel(), documents(front)), dy


def test_the_selective_scan_forward(scan_cut):
    def call(front):
        initial = jnp.asarray(normal(np.random.default_rng(3), 1, WIDTH, 2))
        selective_scan_triton.forward(scan_inputs(front)[0], initial, spec=selective_scan.ScanSpec())

    compare_far(call, FRONT, lcx_selective_scan="u dt z y")


def test_the_selective_scan_over_a_stretch(scan_cut):
    call = lambda front: selective_scan_triton.summary(scan_inputs(front)[0], spec=selective_scan.ScanSpec())
    compare_far(call, FRONT, lcx_selective_scan_stretch="x dt")


def test_the_selective_scan_backward(scan_cut):
    def call(front):
        inputs, dy = scan_inputs(front)
        chunks = -(-(front + TAIL) // selective_scan_triton_cut.CHUNK)
        dfinal = jnp.asarray(normal(np.random.default_rng(3), 1, WIDTH, 2))
        starts = states_in_front(1, chunks, 8, WIDTH)
        selective_scan_triton.backward(inputs, starts, dy, dfinal, spec=selective_scan.ScanSpec())

    compare_far(call, FRONT, lcx_selective_scan_backward="u dt z dy du ddt dz")


# State-space duality.

H, K, G, N = 128, 256, 16, 16


@pytest.fixture
def ssd_cut(monkeypatch):
    """Two segments in front of the last tokens, which are one of two chunks; backward a stripe of its own."""
    sizes = dict(CHUNK=16, CHUNKS=2, WIDTH=K, STRIPE=1)
    for name, size in sizes.items():
        monkeypatch.setattr(ssd_triton_cut, name, size)
        if hasattr(ssd_triton, name):
            monkeypatch.setattr(ssd_triton, name, size)
    size = SEGMENT // 32
    monkeypatch.setattr(ssd_triton_cut.Cut, "segments", lambda self, blocks: (size, -(-blocks // size)))


def ssd_inputs(front):
    random = np.random.default_rng(2)
    x, dy, B, C, dt = by_token(front, (H, K), (H, K), (G, N), (G, N), (H,))
    head = lambda: jnp.asarray(normal(random, H))
    return ssd.Inputs(x, jnp.abs(jnp.asarray(dt)), -jnp.exp(head()), B, C, head(), None, documents(front)), dy


SPEC = ssd.SsdSpec(dt_softplus=False)


def test_ssd_over_a_stretch(ssd_cut):
    call = lambda front: ssd_triton.summary(ssd_inputs(front)[0], spec=SPEC)
    compare_far(call, FRONT, lcx_ssd_summary="x")


def test_ssd_forward(ssd_cut):
    def call(front):
        initial = jnp.asarray(normal(np.random.default_rng(3), 1, H, K, N))
        ssd_triton.forward(ssd_inputs(front)[0], initial, spec=SPEC)

    compare_far(call, FRONT, lcx_ssd="x y")


def test_ssd_backward(ssd_cut):
    def call(front):
        inputs, dy = ssd_inputs(front)
        starts = np.zeros((1, H, -(-(front + TAIL) // 32), N, K), np.float32)
        random = np.random.default_rng(3)
        starts[:, :, -1] = normal(random, 1, H, N, K)
        ssd_triton.backward(inputs, starts, dy, jnp.asarray(normal(random, 1, H, K, N)), spec=SPEC)

    compare_far(call, FRONT, lcx_ssd_states="x", lcx_ssd_gradients="dy", lcx_ssd_pairs="x dy", lcx_ssd_maps="x dy")


# The convolution.


@pytest.fixture
def short_stretches(monkeypatch):
    monkeypatch.setattr(causal_conv_triton, "stretch", lambda B, S, E: 16)


def conv_inputs(front):
    random, (x, dy) = np.random.default_rng(4), by_token(front, (WIDTH,), (WIDTH,))
    segments = np.ones((1, front + TAIL), np.int32)
    segments[:, -2:] = 2
    initial = jnp.zeros((1, 3, WIDTH), jnp.bfloat16)
    weights = jnp.asarray(normal(random, WIDTH, 4)), jnp.asarray(normal(random, WIDTH))
    return causal_conv.Inputs(x, *weights, initial, jnp.asarray(segments)), dy


def test_the_convolution_forward(short_stretches):
    call = lambda front: causal_conv_triton.forward(conv_inputs(front)[0], spec=causal_conv.ConvSpec("silu"))
    compare_far(call, FRONT, lcx_causal_conv="x y")


def test_the_convolution_backward(short_stretches):
    call = lambda front: causal_conv_triton.backward(*conv_inputs(front), spec=causal_conv.ConvSpec("silu"))
    compare_far(call, FRONT, lcx_causal_conv_backward="x dy dx")
