"""Sequence parallelism of every recurrence: each device summarises its tokens, and learns the state in front of them.

A stretch of tokens maps the state before it to the state after it, s -> decay * s + state (`lcx.ops.recurrence.Affine`). The
state in front of a device is the composition of the stretches before it, applied to zero; the gradient of the state behind it
is the composition, from the right, of the reverse stretches after it.
"""

import functools
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lcx.ops.recurrence import Affine, apply, compose
from lcx.ops.recurrence_backend import kept, without_marks

# Summaries of all devices together up to here are gathered, in one message; larger ones travel in log2(P) steps.
GATHER_BYTES = 2**20


def exclusive_prefix(stretch: Affine, rate: jax.Array, *, shards: int, axis: str = "seq", reverse: bool = False) -> jax.Array:
    """The state in front of this device, when it is zero in front of the first.

    Args:
      stretch: of this device; call inside a region where `axis` is manual.
      rate: of decay, as in `lcx.ops.recurrence.compose`.
      shards: devices along `axis`.
      reverse: the state behind this device, when it is zero behind the last; `stretch` then maps it to what is in front.
    """
    message, unpack = _pack(stretch)
    if shards * message.size * message.dtype.itemsize <= GATHER_BYTES:
        return _by_gather(message, unpack, rate, shards, axis, reverse)
    return _by_steps(message, unpack, rate, shards, axis, reverse)


def _pack(stretch: Affine):
    """A stretch as one vector, and the way back."""
    sizes = [x.size for x in stretch]

    def unpack(message: jax.Array) -> Affine:
        parts = jnp.split(message, np.cumsum(sizes)[:-1])
        return Affine(*(part.reshape(x.shape) for part, x in zip(parts, stretch, strict=True)))

    return jnp.concatenate([x.reshape(-1) for x in stretch]), unpack


def _by_gather(message, unpack, rate, shards, axis, reverse):
    every, rank = lax.all_gather(message, axis), lax.axis_index(axis)

    def pass_device(state, i):
        before = i > rank if reverse else i < rank
        return jnp.where(before, apply(unpack(every[i]), state, rate), state), None

    start = jnp.zeros_like(unpack(message).state)
    return lax.scan(pass_device, start, jnp.arange(shards), reverse=reverse)[0]


def _by_steps(message, unpack, rate, shards, axis, reverse):
    """Hillis and Steele 1986: after the step of distance d a device knows the 2d stretches before it. A device that receives
    nothing receives zeros, which are the map that changes nothing."""
    ahead = -1 if reverse else 1

    def receive(x, distance):
        pairs = [(r, r + ahead * distance) for r in range(shards) if 0 <= r + ahead * distance < shards]
        return lax.ppermute(x, axis, pairs)

    message, distance = receive(message, 1), 1
    while distance < shards - 1:
        earlier = unpack(receive(message, distance))
        message, distance = _pack(compose(earlier, unpack(message), rate))[0], 2 * distance
    return unpack(message).state


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def scan_over_devices(backend: ModuleType, spec: Any, rate_of: Any, shards: int, inputs: Any) -> jax.Array:
    """The outputs of a recurrence whose tokens are cut across devices. Call where every mesh axis is manual.

    Args:
      backend: of the recurrence (`lcx.ops.selective_scan`, "Backends").
      spec: what the backend knows statically.
      rate_of: inputs -> rate of decay against elapsed.
      shards: devices along `seq`.
      inputs: of this device, with marks made with the segment to its left.
    """
    return _forward(backend, spec, rate_of, shards, inputs)[0]


def _forward(backend, spec, rate_of, shards, inputs):
    initial = exclusive_prefix(backend.summary(inputs, spec=spec), rate_of(inputs), shards=shards)
    y, _, residuals = backend.forward(inputs, initial, spec=spec)
    y, residuals = kept(y, residuals)
    return y, (inputs, residuals)


def _backward(backend, spec, rate_of, shards, saved, dy):
    inputs, residuals = saved
    reverse = backend.reverse_summary(inputs, dy, spec=spec)
    dfinal = exclusive_prefix(reverse, rate_of(inputs), shards=shards, reverse=True)
    gradients, _ = backend.backward(inputs, residuals, dy, dfinal, spec=spec)
    return (without_marks(gradients, inputs),)


scan_over_devices.defvjp(_forward, _backward)
