"""How a call of the TPU kernels of state-space duality is divided among programs, and what each of them reads and writes.

A program computes a block of tokens, chunk after chunk, for some heads of one group of B and C. Blocks go in the order of the
recurrence; the states of the program's heads stay in the chip, and the state in front of every block is kept. Heads stand side
by side along lanes, so that 128 lanes, a *tile*, are one head of width 128 or two of width 64.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lcx.ops.recurrence import Marks, pad_marks
from pallas_kernels.mosaic_tpu import TWO_CORES, Operand, vmem_bytes
from pallas_kernels.tiles import device_kind

LANES = 128
# Tokens of a chunk: pairs of tokens then fill the matrix unit, and are fewer than the operations on a state of 64 to 256.
CHUNK = 128
# Chunks of a block, the most that fits the chip: 4 N / (CHUNK * chunks) bytes are kept for a token and channel.
CHUNKS = (4, 2, 1)
# Tiles of a program, the first that divides a group's and fits. More would share one C B^T, which is then a twentieth of the
# products; first come those that `ssd_tpu_chunk.over_tiles` takes four or three at a time.
TILES = (8, 4, 6, 3, 2, 1)


class Cut:
    """How one call is divided.

    Attributes:
      B, S, H, K, G, N: sizes of the call.
      kind: dtype of the operands of products: fp32 where any array of tokens is.
      per_tile: heads of a tile.
      tiles, heads: of a program. A group whose heads do not fill its tiles gets heads of zeros.
      parts: programs that share the heads of a group.
      chunk, chunks, block, blocks: tokens of a chunk, chunks of a block, tokens of a block, and how many blocks.
      reverse: whether blocks are taken from the last to the first.
    """

    def __init__(self, inputs, reverse: bool = False):
        (self.B, self.S, self.H, self.K), (self.G, self.N) = inputs.x_BSHK.shape, inputs.B_BSGN.shape[2:]
        wide = any(x.dtype == jnp.float32 for x in (inputs.x_BSHK, inputs.B_BSGN, inputs.C_BSGN))
        self.kind = jnp.dtype(jnp.float32 if wide else jnp.bfloat16)
        self.per_tile = LANES // self.K
        tiles = -(-self.H // self.G // self.per_tile)
        self.parts, chunks = divide(tiles, self.B * self.G, self.N, self.kind.itemsize, device_kind())
        self.tiles = tiles // self.parts
        self.heads = self.tiles * self.per_tile
        self.chunk = CHUNK
        self.chunks = min(chunks, -(-self.S // self.chunk))
        self.block = self.chunk * self.chunks
        self.blocks = -(-self.S // self.block)
        self.reverse = reverse

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """Programs: rows of the batch, groups, parts of a group, blocks in the order of the recurrence."""
        return self.B, self.G, self.parts, self.blocks

    @property
    def vmem_bytes(self) -> int:
        """Of fast memory that a program may take."""
        return vmem_bytes(device_kind())

    @property
    def lanes(self) -> int:
        """Of a program."""
        return self.tiles * LANES

    def _spec(self, shape: tuple[int | None, ...], place: Callable) -> pl.BlockSpec:
        """Blocks at place(row of the batch, group, part among all groups' parts, block of tokens)."""
        at = lambda i: self.blocks - 1 - i if self.reverse else i
        return pl.BlockSpec(shape, lambda b, g, part, i: place(b, g, g * self.parts + part, at(i)))

    # Heads: ... H ... as ... (groups' parts) (heads of a program) ...

    def _by_part(self, x: jax.Array, dim: int) -> jax.Array:
        """Splits the dim of heads."""
        x = x.reshape(*x.shape[:dim], self.G, -1, *x.shape[dim + 1 :])
        more = self.parts * self.heads - x.shape[dim + 1]
        x = jnp.pad(x, [(0, more if i == dim + 1 else 0) for i in range(x.ndim)])
        return x.reshape(*x.shape[:dim], self.G * self.parts, self.heads, *x.shape[dim + 2 :])

    def _by_head(self, x: jax.Array, dim: int) -> jax.Array:
        """The inverse of `_by_part`."""
        x = x.reshape(*x.shape[:dim], self.G, self.parts * self.heads, *x.shape[dim + 2 :])
        x = jax.lax.slice_in_dim(x, 0, self.H // self.G, axis=dim + 1)
        return x.reshape(*x.shape[:dim], self.H, *x.shape[dim + 2 :])

    def tokens(self, x_BSHK) -> Operand:
        """The program's tokens and heads of B S H K; a shape for an output."""
        all_lanes = self.G * self.parts * self.lanes
        if isinstance(x_BSHK, jax.ShapeDtypeStruct):
            x = jax.ShapeDtypeStruct((self.B, self.S, all_lanes), x_BSHK.dtype)
        else:
            x = None if x_BSHK is None else self._by_part(x_BSHK, 2).reshape(self.B, self.S, all_lanes)
        return Operand(x, self._spec((None, self.block, self.lanes), lambda b, g, part, i: (b, i, part)))

    def of_tokens(self, x: jax.Array) -> jax.Array:
        """An output of `tokens` as B S H K."""
        return self._by_head(x.reshape(self.B, self.S, self.G * self.parts, self.heads, self.K), 2)

    def maps(self, x_BSGN: jax.Array | None) -> Operand:
        """The program's tokens of B S G N, groups in front of tokens."""
        x = None if x_BSGN is None else jnp.swapaxes(x_BSGN, 1, 2)
        return Operand(x, self._spec((None, None, self.block, self.N), lambda b, g, part, i: (b, g, i, 0)))

    def map_sums(self) -> Operand:
        """An output: what each part adds to the gradient of a map."""
        shape = jax.ShapeDtypeStruct((self.B, self.G * self.parts, self.S, self.N), jnp.float32)
        return Operand(shape, self._spec((None, None, self.block, self.N), lambda b, g, part, i: (b, part, i, 0)))

    def of_maps(self, x: jax.Array) -> jax.Array:
        """`map_sums` as B S G N."""
        return jnp.swapaxes(x.reshape(self.B, self.G, self.parts, self.S, self.N).sum(2), 1, 2)

    def rows(self, x_BSH: jax.Array | None) -> Operand:
        """The program's tokens and heads of B S H in fp32, tokens along lanes; None for an output."""
        padded = self.blocks * self.block
        if x_BSH is None:
            x = jax.ShapeDtypeStruct((self.B, self.G * self.parts, self.heads, padded), jnp.float32)
        else:
            # Slice by slice: a reshape that splits heads, with tokens behind them, compiles for minutes at 8 million tokens.
            x = jnp.swapaxes(jnp.pad(x_BSH.astype(jnp.float32), ((0, 0), (0, padded - self.S), (0, 0))), 1, 2)
            of_parts = [x[:, first : first + count] for first, count in self._heads_of_parts()]
            filled = [jnp.pad(part, ((0, 0), (0, self.heads - part.shape[1]), (0, 0))) for part in of_parts]
            x = jnp.stack(filled, axis=1)
        return Operand(x, self._spec((None, None, self.heads, self.block), lambda b, g, part, i: (b, part, 0, i)))

    def of_rows(self, x: jax.Array) -> jax.Array:
        """An output of `rows` as B S H."""
        of_parts = [x[:, part, :count, : self.S] for part, (_, count) in enumerate(self._heads_of_parts())]
        return jnp.swapaxes(jnp.concatenate(of_parts, axis=1), 1, 2)

    def _heads_of_parts(self) -> list[tuple[int, int]]:
        """(the first, how many) of each part of all groups."""
        R = self.H // self.G
        return [(g * R + at, min(self.heads, R - at)) for g in range(self.G) for at in range(0, R, self.heads)]

    def codes(self, marks: Marks | None) -> Operand:
        """Two rows of 1 and 0 for the tokens: a document starts; it is a token.

        Nothing where all are tokens of one document.
        """
        padded, codes = self.blocks * self.block, None
        marked = pad_marks(marks, (self.B, self.S), padded - self.S)
        if marked is not None:
            codes = jnp.stack(marked, axis=1).astype(jnp.float32)
        return Operand(codes, self._spec((None, 2, self.block), lambda b, g, part, i: (b, 0, i)))

    def by_head(self, x_H: jax.Array | None) -> Operand:
        """A number of each of the program's heads, fp32, along sublanes."""
        x = None if x_H is None else self._by_part(x_H.astype(jnp.float32), 0)[..., None]
        return Operand(x, self._spec((None, self.heads, 1), lambda b, g, part, i: (part, 0, 0)))

    def by_lane(self, x_H: jax.Array) -> Operand:
        """A number of each of the program's heads, fp32, in all of its lanes."""
        x = self._by_part(x_H.astype(jnp.float32), 0)[:, None, :, None]
        x = jnp.broadcast_to(x, (*x.shape[:3], self.K)).reshape(-1, 1, self.lanes)
        return Operand(x, self._spec((None, 1, self.lanes), lambda b, g, part, i: (part, 0, 0)))

    def head_sums(self) -> Operand:
        """An output: sums of each head's tokens, those of one place in their chunks in a lane; it stays in the chip."""
        shape = jax.ShapeDtypeStruct((self.B, self.G * self.parts, self.heads, self.chunk), jnp.float32)
        return Operand(shape, self._spec((None, None, self.heads, self.chunk), lambda b, g, part, i: (b, part, 0, 0)))

    def of_heads(self, x: jax.Array) -> jax.Array:
        """`head_sums` as H."""
        return self._by_head(x.sum((0, 3)), 0)

    def lane_sums(self) -> Operand:
        """An output: sums over tokens in every lane, in 8 parts; it stays in the chip."""
        shape = jax.ShapeDtypeStruct((self.B, self.G * self.parts, 8, self.lanes), jnp.float32)
        return Operand(shape, self._spec((None, None, 8, self.lanes), lambda b, g, part, i: (b, part, 0, 0)))

    def of_lanes(self, x: jax.Array) -> jax.Array:
        """`lane_sums` as H."""
        return self._by_head(x.sum((0, 2)).reshape(-1, self.heads, self.K).sum(2), 0)

    # States: B H K N as B (groups' parts) N (lanes of a program).

    def state(self, x_BHKN: jax.Array | None = None) -> Operand:
        """The program's states, which stay in the chip; None for an output."""
        if x_BHKN is None:
            x = jax.ShapeDtypeStruct((self.B, self.G * self.parts, self.N, self.lanes), jnp.float32)
        else:
            x = self._by_part(x_BHKN, 1).reshape(self.B, self.G * self.parts, self.lanes, self.N)
            x = jnp.swapaxes(x, 2, 3)
        return Operand(x, self._spec((None, None, self.N, self.lanes), lambda b, g, part, i: (b, part, 0, 0)))

    def of_state(self, x: jax.Array) -> jax.Array:
        """An output of `state` as B H K N."""
        x = jnp.swapaxes(x, 2, 3).reshape(self.B, self.G * self.parts, self.heads, self.K, self.N)
        return self._by_head(x, 1)

    def starts(self, x: jax.Array | None = None) -> Operand:
        """The program's states in front of its block, as `state` has them; None for an output."""
        if x is None:
            x = jax.ShapeDtypeStruct((self.B, self.blocks, self.G * self.parts, self.N, self.lanes), jnp.float32)
        return Operand(x, self._spec((None, None, None, self.N, self.lanes), lambda b, g, part, i: (b, i, part, 0, 0)))

    # Memory of a program.

    def per_head(self):
        """A row of a chunk's tokens for each chunk and head."""
        return pltpu.VMEM((self.chunks * self.heads, self.chunk), jnp.float32)

    def keep(self):
        """A mask of the chunk's tokens, in every lane."""
        return pltpu.VMEM((self.chunk, LANES), jnp.float32)

    def pairs(self):
        """A number for each pair of the chunk's tokens."""
        return pltpu.VMEM((self.chunk, self.chunk), jnp.float32)

    def map_memory(self, dtype):
        """A map of the chunk."""
        return pltpu.VMEM((self.chunk, self.N), dtype)

    def turned(self):
        """A map of the chunk, tokens along lanes."""
        return pltpu.VMEM((self.N, self.chunk), self.kind)

    def cost(self, pairs: int, states: int, *moved: jax.Array) -> pl.CostEstimate:
        """Of a kernel of so many products of a head's pairs of tokens with K, and so many with its state."""
        heads = self.B * self.S * self.H
        flops = 2 * heads * self.K * (pairs * self.chunk + states * self.N)
        size = sum(x.size * x.dtype.itemsize for x in moved if x is not None)
        return pl.CostEstimate(flops=flops, transcendentals=heads * self.chunk if pairs else heads, bytes_accessed=size)


def divide(tiles: int, rows: int, N: int, itemsize: int, kind: str) -> tuple[int, int]:
    """(parts of a group's `tiles`, chunks of a block) on a device, for `rows` rows and groups.

    Both passes are cut alike, and the backward pass takes more: two buffers of x, dy and dx, of B and C, of dB and dC in fp32,
    and of three states; a state for every chunk of the block; and 4 MiB for what belongs to one chunk.
    """
    two = 2 if kind in TWO_CORES and rows % 2 and tiles % 2 == 0 else 1
    for chunks in CHUNKS:
        for size in TILES:
            tokens, lanes = chunks * CHUNK, size * LANES
            by_token = 2 * tokens * (3 * itemsize * lanes + 2 * (itemsize + 4) * max(N, LANES))
            fits = by_token + (6 + chunks) * 4 * N * lanes + 2**22 <= vmem_bytes(kind)
            if fits and tiles % (two * size) == 0:
                return tiles // size, chunks
    raise AssertionError(f"one tile and one chunk of N={N} do not fit {kind}")
