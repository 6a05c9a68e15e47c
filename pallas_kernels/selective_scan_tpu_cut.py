"""How a call of the TPU kernels of the selective scan is divided among programs, and what each of them reads and writes.

A program computes a chunk of tokens of a tile of 1,024 channels. Chunks go in the order of the recurrence, tiles inside; the
states of all channels stay in the chip. Where a device has two cores and the batch does not occupy both, each takes half of
the channels.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lcx.ops.recurrence import Marks, pad_marks
from pallas_kernels.mosaic_tpu import TWO_CORES, Operand, vmem_bytes
from pallas_kernels.scan_tpu import LOG2E
from pallas_kernels.tiles import device_kind

LANES, GROUPS = 128, 8
TILE = LANES * GROUPS
# Tokens of a program, and between two states that are kept: 4 N / chunk bytes a token and channel. The first that fits the chip.
CHUNKS = (128, 64, 32)
# States of a map are padded to a multiple: rows of a register of bf16.
MAP_ROWS = 16
# Rows of a slab of 8 tokens in memory: group of channels j stands from row 9 j on. A load can take 8 rows at a time with a
# stride of 9, and only 4 with one of 8.
STRIDE = 9
SLAB = GROUPS * STRIDE
# What stands in the column of a token: nothing below 0 is a token, and a state decays to 0 in this time.
PADDING, RESET = -1.0, 3e38
# The slowest rate for which it does; exp(-1e-36 dt) is 1 for every dt.
SLOWEST = 1e-36


class Cut:
    """How one call is divided.

    Attributes:
      B, S, E, N: sizes of the call.
      tiles: of 1,024 channels; the last one may hold channels that are none.
      cores: parts of the channels that different cores may take.
      chunk, chunks: tokens of a chunk, and how many; the last one may hold tokens that are none.
      reverse: whether chunks are taken from the last to the first.
    """

    def __init__(self, inputs, reverse: bool = False):
        (self.B, self.S, self.E), self.N = inputs.dt_BSE.shape, inputs.A_EN.shape[1]
        self.tiles = -(-self.E // TILE)
        self.cores = 2 if device_kind() in TWO_CORES and self.B % 2 and self.tiles % 2 == 0 else 1
        itemsize = max(x.dtype.itemsize for x in (inputs.u_BSE, inputs.dt_BSE, inputs.z_BSE) if x is not None)
        self.chunk = chunk_of(self.E, self.N, itemsize, device_kind())
        self.chunks = -(-self.S // self.chunk)
        self.reverse = reverse

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """Programs: rows of the batch, parts of the channels, chunks in the order of the recurrence, tiles of channels."""
        return self.B, self.cores, self.chunks, self.tiles // self.cores

    @property
    def vmem_bytes(self) -> int:
        """Of fast memory that a program may take."""
        return vmem_bytes(device_kind())

    @property
    def ragged(self) -> bool:
        """Whether blocks hold memory that nothing was written to, so that even 0 times it is not 0."""
        return bool(self.E % TILE or self.S % self.chunk)

    def _spec(self, shape: tuple[int | None, ...], place: Callable) -> pl.BlockSpec:
        """Blocks at place(row of the batch, part, chunk, tile)."""
        at = lambda i: self.chunks - 1 - i if self.reverse else i
        per_core = self.tiles // self.cores
        return pl.BlockSpec(shape, lambda b, core, i, k: place(b, core, at(i), core * per_core + k))

    def tokens(self, x_BSE) -> Operand:
        """The program's tokens and channels of B S E, an array or its shape."""
        return Operand(x_BSE, self._spec((None, self.chunk, TILE), lambda b, core, i, tile: (b, i, tile)))

    def maps(self, x_BSN: jax.Array | None) -> Operand:
        """The program's tokens of B S N, tokens along lanes: states there would be padded to 128 in memory."""
        part, x = (self.N + -self.N % MAP_ROWS, self.chunk), None
        if x_BSN is not None:
            x = jnp.pad(x_BSN, ((0, 0), (0, self.chunks * self.chunk - self.S), (0, part[0] - self.N)))
            x = jnp.swapaxes(x.reshape(self.B, self.chunks, self.chunk, part[0]), 2, 3)
        return Operand(x, self._spec((None, None, *part), lambda b, core, i, tile: (b, i, 0, 0)))

    @property
    def slabs(self) -> int:
        """Slabs of 8 tokens whose sums over channels are made together."""
        return min(8, self.chunk // GROUPS)

    def sums(self) -> Operand:
        """An output, numbers of each token and state: of `slabs` and 16 states a register, tokens of a slab along sublanes."""
        part = self.chunk // GROUPS // self.slabs, -(-self.N // 16), GROUPS, LANES
        shape = jax.ShapeDtypeStruct((self.B, self.cores, self.chunks, *part), jnp.float32)
        return Operand(shape, self._spec((None, None, None, *part), lambda b, core, i, tile: (b, core, i, 0, 0, 0, 0)))

    def by_map(self, sums: jax.Array) -> jax.Array:
        """`sums` as B S N."""
        tokens = self.chunks * self.chunk
        x = sums.sum(1).reshape(self.B, tokens // GROUPS // self.slabs, -1, 8, 16, 8)[..., : self.slabs]  # token, state, slab
        x = x.transpose(0, 1, 5, 3, 2, 4).reshape(self.B, tokens, -1)
        return x[:, : self.S, : self.N]

    def codes(self, marks: Marks | None) -> Operand:
        """What each token is, as a row for each chunk; nothing where all are tokens of one document."""
        marked, codes = pad_marks(marks, (self.B, self.S), self.chunks * self.chunk - self.S), None
        if marked is not None:
            codes = jnp.where(marked.real_BS, jnp.where(marked.reset_BS, RESET, 0.0), PADDING)
            codes = codes.reshape(self.B, self.chunks, 1, self.chunk)
        return Operand(codes, self._spec((None, None, 1, self.chunk), lambda b, core, i, tile: (b, i, 0, 0)))

    # States: ... E N as ... N (8 tiles) 128, so that one state of a tile of channels is a register.

    def registers(self, x_xEN: jax.Array) -> jax.Array:
        """... E N in fp32 as registers, zero in channels that are none."""
        x = jnp.swapaxes(x_xEN.astype(jnp.float32), -1, -2)
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, self.tiles * TILE - self.E)])
        return x.reshape(*x.shape[:-1], self.tiles * GROUPS, LANES)

    def states(self, x: jax.Array) -> jax.Array:
        """The inverse of `registers`."""
        return jnp.swapaxes(x.reshape(*x.shape[:-2], self.tiles * TILE)[..., : self.E], -1, -2)

    def rates(self, A_xEN: jax.Array) -> Operand:
        """A rate of every channel of the part, as registers."""
        A = self.registers(A_xEN)
        part = (self.N, A.shape[1] // self.cores, LANES)
        return Operand(A, self._spec(part, lambda b, core, i, tile: (0, core, 0)))

    def log2_rates(self, A_EN: jax.Array) -> Operand:
        """A for exp2, never so slow that `RESET` would not end it."""
        A_EN = A_EN.astype(jnp.float32) * LOG2E
        return self.rates(jnp.where(jnp.abs(A_EN) < SLOWEST, -SLOWEST, A_EN))

    def state(self, x: jax.Array | None = None) -> Operand:
        """A state of every channel of the part, which stays in the chip; None for an output."""
        part = (None, self.N, self.tiles // self.cores * GROUPS, LANES)
        x = jax.ShapeDtypeStruct((self.B, self.N, self.tiles * GROUPS, LANES), jnp.float32) if x is None else x
        return Operand(x, self._spec(part, lambda b, core, i, tile: (b, 0, core, 0)))

    def starts(self, x: jax.Array | None = None) -> Operand:
        """The state in front of each chunk; None for an output."""
        if x is None:
            x = jax.ShapeDtypeStruct((self.B, self.chunks, self.N, self.tiles * GROUPS, LANES), jnp.float32)
        return Operand(x, self._spec((None, None, self.N, GROUPS, LANES), lambda b, core, i, tile: (b, i, 0, tile, 0)))

    def channels(self, x_E: jax.Array | None) -> Operand:
        """A number of every channel of the part, fp32."""
        if x_E is not None:
            x_E = jnp.pad(x_E.astype(jnp.float32), (0, self.tiles * TILE - self.E)).reshape(self.tiles, 1, TILE)
        part = self.tiles // self.cores, 1, TILE
        return Operand(x_E, self._spec(part, lambda b, core, i, tile: (core, 0, 0)))

    def channel_sums(self) -> Operand:
        """An output: sums over a row's tokens for every channel, in 8 parts, which stay in the chip."""
        shape = jax.ShapeDtypeStruct((self.B, self.tiles, GROUPS, TILE), jnp.float32)
        part = None, self.tiles // self.cores, GROUPS, TILE
        return Operand(shape, self._spec(part, lambda b, core, i, tile: (b, core, 0, 0)))

    def by_channel(self, sums: jax.Array) -> jax.Array:
        """`channel_sums` as E."""
        return sums.sum((0, 2)).reshape(-1)[: self.E]

    def spread(self):
        """Memory for rows that become tiles, or the other way."""
        return pltpu.VMEM((self.chunk // GROUPS * SLAB, LANES), jnp.float32)

    def turned(self, map_BSN: jax.Array):
        """Memory for a map of the chunk as B S N has it."""
        return pltpu.VMEM((self.chunk, self.N + -self.N % MAP_ROWS), map_BSN.dtype)

    def across(self):
        """Memory for a map B S N of the chunk, each number in every lane: row 8 (N slab + n) + token of the slab."""
        return pltpu.VMEM((self.chunk * self.N, LANES), jnp.float32)

    def columns(self, codes: Operand):
        """Memory for the codes of the chunk, each in every lane."""
        return None if codes.array is None else pltpu.VMEM((self.chunk, LANES), jnp.float32)

    def cost(self, per_state: int, *moved: jax.Array) -> pl.CostEstimate:
        """Of a kernel with so many operations for each token, channel and state."""
        states = self.B * self.S * self.E * self.N
        size = sum(x.size * x.dtype.itemsize for x in moved if x is not None)
        return pl.CostEstimate(flops=per_state * states, transcendentals=states, bytes_accessed=size)


def chunk_of(E: int, N: int, itemsize: int, kind: str) -> int | None:
    """Tokens of a chunk for E channels of N states on a device; None if not even the smallest fits.

    Both passes are cut alike, and the backward pass takes more: per token of a tile its states, most of their decays, four maps
    with a number in every lane, eight numbers of its channels, and two buffers of seven arrays; and two of five states of all
    channels.
    """
    register = 4 * TILE
    token = (N + kept_decays(N)) * register + 4 * N * 4 * LANES + 8 * 9 * register // 8 + 2 * 7 * itemsize * TILE
    channels = 2 * 5 * N * register * -(-E // TILE) + 2 * N * SLAB * 4 * LANES + 2**20
    # A quarter is left to the compiler: it took 19 MiB where this says 16.
    return next((chunk for chunk in CHUNKS if chunk * token + channels <= 0.75 * vmem_bytes(kind)), None)


def kept_decays(N: int) -> int:
    """States whose decays are kept from the first pass over a chunk: as many as it has time to store."""
    return 5 * N // 8
