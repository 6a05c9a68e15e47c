"""One problem of a recurrence for a benchmark: its arrays, functions that solve it, and how fast it could be at best."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from lcx.ops.selective_scan import selective_scan
from lcx.ops.ssd import ssd
from lcx.planning.targets import PEAK_BYTES, PEAK_EXPONENTIALS, PEAK_FLOPS, figure

# Where step sizes start in a model: between these, evenly by logarithm.
STEPS = 1e-3, 0.1
# Tokens of a chunk when products of SSD are counted: the least that fills a matrix unit.
LEAST_CHUNK = 64


@dataclasses.dataclass(frozen=True)
class Scan:
    """B rows of S tokens of the selective scan (Mamba-1), with gate, bias and softplus as a mixer has them.

    Attributes:
      B, S, E, N: rows, tokens in each, channels, states of a channel.
      packed: rows of documents with padding behind them; else one document a row.
      dtype: of the arrays of tokens.
    """

    B: int
    S: int
    E: int
    N: int
    packed: bool = False
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        """In a word or two."""
        return f"E={self.E}, N={self.N}{', packed' if self.packed else ''}"

    def inputs(self) -> dict[str, jax.Array]:
        """The arguments by name: the same at every call, step sizes as in a new model."""
        (B, S, E, N), of = (self.B, self.S, self.E, self.N), _Random(self.dtype)
        return dict(
            u_BSE=of.tokens(B, S, E),
            dt_BSE=of.tokens(B, S, E),
            A_EN=-jnp.broadcast_to(jnp.arange(1.0, N + 1), (E, N)),
            B_BSN=of.tokens(B, S, N),
            C_BSN=of.tokens(B, S, N),
            D_E=jnp.ones(E),
            z_BSE=of.tokens(B, S, E),
            dt_bias_E=of.step_biases(E),
        )

    @property
    def state(self) -> tuple[str, tuple[int, ...]]:
        """The name of an initial state among the arguments, and its shape."""
        return "initial_state_BEN", (self.B, self.E, self.N)

    def solver(self, implementation: str) -> Callable[[dict[str, jax.Array]], tuple[jax.Array, jax.Array]]:
        """Arguments -> (y, final state) by this implementation."""
        return _solver(functools.partial(selective_scan, implementation=implementation), self.segments_BS())

    def segments_BS(self) -> np.ndarray | None:
        """int32 document ids, 0 for padding."""
        return _segments(self.B, self.S) if self.packed else None

    def floors(self, direction: str, device_kind: str) -> dict[str, float]:
        """Least seconds that each unit of a device takes, where its figure is published.

        memory: every array once (u, dt, z, y; u, dt, z, dy, du, ddt, dz). exponentials: one decay a token, channel and state.
        """
        arrays, maps = {"forward": (4, 2), "backward": (7, 4)}[direction]
        moved = self.B * self.S * jnp.dtype(self.dtype).itemsize * (arrays * self.E + maps * self.N)
        return _seconds(device_kind, memory=moved, exponentials=self.B * self.S * self.E * self.N)


@dataclasses.dataclass(frozen=True)
class Ssd:
    """B rows of S tokens of state-space duality (Mamba-2), one group of B and C, with bias and softplus.

    Attributes:
      B, S, H, K, N: rows, tokens in each, heads, head width, size of a state.
      packed, dtype: as in `Scan`.
    """

    B: int
    S: int
    H: int
    K: int
    N: int
    packed: bool = False
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        """In a word or two."""
        return f"H={self.H}, K={self.K}, N={self.N}{', packed' if self.packed else ''}"

    @property
    def E(self) -> int:
        """Width of all heads."""
        return self.H * self.K

    def inputs(self) -> dict[str, jax.Array]:
        """As of `Scan`."""
        (B, S, H, K, N), of = (self.B, self.S, self.H, self.K, self.N), _Random(self.dtype)
        return dict(
            x_BSHK=of.tokens(B, S, H, K),
            dt_BSH=of.tokens(B, S, H),
            A_H=-jnp.linspace(1.0, 16.0, H),
            B_BSGN=of.tokens(B, S, 1, N),
            C_BSGN=of.tokens(B, S, 1, N),
            D_H=jnp.ones(H),
            dt_bias_H=of.step_biases(H),
        )

    @property
    def state(self) -> tuple[str, tuple[int, ...]]:
        """As of `Scan`."""
        return "initial_state_BHKN", (self.B, self.H, self.K, self.N)

    def solver(self, implementation: str) -> Callable[[dict[str, jax.Array]], tuple[jax.Array, jax.Array]]:
        """As of `Scan`."""
        return _solver(functools.partial(ssd, implementation=implementation), self.segments_BS())

    def segments_BS(self) -> np.ndarray | None:
        """int32 document ids, 0 for padding."""
        return _segments(self.B, self.S) if self.packed else None

    def floors(self, direction: str, device_kind: str) -> dict[str, float]:
        """As of `Scan`. memory: x, dt, y; x, dt, dy, dx, ddt; maps. products: in chunks of 64 tokens, with the state as well."""
        arrays, steps, maps = {"forward": (2, 1, 2), "backward": (3, 2, 4)}[direction]
        of_pairs, of_states, of_maps = {"forward": (1, 2, 1), "backward": (3, 5, 3)}[direction]
        tokens = self.B * self.S
        moved = tokens * jnp.dtype(self.dtype).itemsize * (arrays * self.E + steps * self.H + maps * self.N)
        flops = 2 * tokens * (self.E * (of_pairs * LEAST_CHUNK + of_states * self.N) + of_maps * LEAST_CHUNK * self.N)
        return _seconds(device_kind, memory=moved, products=flops)


class _Random:
    """Arrays of normal numbers, one key after another."""

    def __init__(self, dtype: str):
        self.dtype, self.keys = dtype, self._keys()

    @staticmethod
    def _keys() -> Iterator[jax.Array]:
        for count in range(16):
            yield jax.random.key(count)

    def tokens(self, *shape: int) -> jax.Array:
        return jax.random.normal(next(self.keys), shape, self.dtype)

    def step_biases(self, count: int) -> jax.Array:
        """What softplus makes into steps of `STEPS`."""
        low, high = map(math.log, STEPS)
        steps = jnp.exp(jax.random.uniform(next(self.keys), (count,), minval=low, maxval=high))
        return steps + jnp.log(-jnp.expm1(-steps))


def _solver(op: Callable, segments_BS: np.ndarray | None) -> Callable:
    return lambda arrays: op(**arrays, segments_BS=segments_BS)


def _segments(B: int, S: int) -> np.ndarray:
    """Three documents of uneven length in a row, the last eighth padding."""
    row_S = 1 + np.searchsorted((S // 5, S // 2 + 3), np.arange(S), side="right").astype(np.int32)
    row_S[S - S // 8 :] = 0
    return np.broadcast_to(row_S, (B, S))


def _seconds(device_kind: str, **amounts: float) -> dict[str, float]:
    """By unit, of those whose figure is known."""
    peaks = dict(memory=PEAK_BYTES, exponentials=PEAK_EXPONENTIALS, products=PEAK_FLOPS)
    known = {unit: figure(peaks[unit], device_kind) for unit in amounts}
    return {unit: amount / known[unit] for unit, amount in amounts.items() if known[unit] is not None}
