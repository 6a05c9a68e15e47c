"""How a call of the TPU kernels of the causal convolution is divided among programs, and what each of them reads and writes."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.causal_conv_support import PART, reaches, whole
from pallas_kernels.mosaic_tpu import TWO_CORES, Operand, vmem_bytes
from pallas_kernels.tiles import device_kind

LANES = 128
# Channels of a program at most, and bytes that its tokens may take of each array. Starting a program takes as long as 100 tokens.
CHANNELS, BLOCK_BYTES = 1024, 2**21
# Rows that are copied of the block in front: a register of bf16. Rows of them that are kept: a register of fp32.
COPIED, KEPT = 16, 8
# Tokens of one turn of a loop: fewer leave the core waiting for its own results, more do not fit its registers.
ROWS = PART


class Cut:
    """How one call is divided.

    Attributes:
      B, S, E, W: sizes of the call.
      channels, tokens: of a program. The last of a row may have tokens that are none; all channels are.
      blocks: of tokens in a row.
      reverse: whether they are taken from the last to the first.
    """

    def __init__(self, inputs, reverse: bool = False):
        (self.B, self.S, self.E), self.W = inputs.x_BSE.shape, inputs.w_EW.shape[1]
        divides = [n for n in range(LANES, min(CHANNELS, self.E) + 1, LANES) if self.E % n == 0]
        shared = [n for n in divides if self.B * self.E // n % 2 == 0]
        self.channels = max(shared if shared and device_kind() in TWO_CORES else divides)
        most = min(BLOCK_BYTES, vmem_bytes(device_kind()) // 16) // (CHANNELS * inputs.x_BSE.dtype.itemsize)
        self.tokens = min(most, self.S + -self.S % ROWS)
        self.blocks = -(-self.S // self.tokens)
        self.reverse = reverse

    @property
    def grid(self) -> tuple[int, int, int]:
        """Programs: rows of the batch, blocks of channels, blocks of tokens in order."""
        return self.B, self.E // self.channels, self.blocks

    @property
    def vmem_bytes(self) -> int:
        """Of fast memory that a program may take."""
        return vmem_bytes(device_kind())

    def _spec(self, shape: tuple[int | None, ...], place: Callable, memory=pltpu.VMEM) -> pl.BlockSpec:
        """Blocks at place(row of the batch, block of channels, block of tokens)."""
        at = lambda i: self.blocks - 1 - i if self.reverse else i
        return pl.BlockSpec(shape, lambda b, e, i: place(b, e, at(i)), memory_space=memory)

    def of_tokens(self, x_BSE) -> Operand:
        """The program's tokens and channels, of an array or its shape."""
        return Operand(x_BSE, self._spec((None, self.tokens, self.channels), lambda b, e, i: (b, i, e)))

    def in_front(self, x_BSE: jax.Array) -> Operand:
        """The last rows of the block in front; in the first block any."""
        place = lambda b, e, i: (b, jnp.maximum(i * (self.tokens // COPIED) - 1, 0), e)
        return Operand(x_BSE, self._spec((None, COPIED, self.channels), place))

    def initial(self, initial_BWE: jax.Array) -> Operand:
        """The rows in front of token 0, as the last of `KEPT`, fp32."""
        x = jnp.pad(initial_BWE.astype(jnp.float32), ((0, 0), (KEPT - self.W + 1, 0), (0, 0)))
        return Operand(x, self._spec((None, KEPT, self.channels), lambda b, e, i: (b, 0, e)))

    def weights(self, rows: jax.Array) -> Operand:
        """A weight of every channel for each distance, and the bias."""
        return Operand(rows, self._spec((self.W + 1, self.channels), lambda b, e, i: (0, e)))

    def sums(self) -> Operand:
        """An output: gradients of `weights` by row of the batch, each in `KEPT` parts, which stay in the chip."""
        shape = jax.ShapeDtypeStruct((self.B, self.W + 1, KEPT, self.E), jnp.float32)
        return Operand(shape, self._spec((None, self.W + 1, KEPT, self.channels), lambda b, e, i: (b, 0, 0, e)))

    def marks(self, segments_BS: jax.Array | None, tail: bool = False) -> dict[str, Operand]:
        """What every token is, as a row for each block, and which parts of blocks have to ask; nothing where none has.

        Args:
          segments_BS: documents.
          tail: whether what stands behind the last token must be known for nothing.
        """
        place = lambda b, e, i: (b, i, 0, 0)
        words, asks = None, None
        if segments_BS is None and tail and self.S < self.blocks * self.tokens:
            segments_BS = jnp.ones((self.B, self.S), jnp.int32)
        if segments_BS is not None:
            words = reaches(segments_BS, self.W)
            words = jnp.pad(words, ((0, 0), (0, self.blocks * self.tokens // ROWS - words.shape[1]), (0, 0)))
            asks = (words != whole(self.W)).any(2).astype(jnp.int32).reshape(self.B, self.blocks, 1, -1)
            words = words.reshape(self.B, self.blocks, 1, self.tokens)
        return dict(
            words=Operand(words, self._spec((None, None, 1, self.tokens), place)),
            asks=Operand(asks, self._spec((None, None, 1, self.tokens // ROWS), place, pltpu.SMEM)),
        )

    def wide(self):
        """Memory for the tokens of 128 channels in fp32, with `KEPT` rows in front or behind."""
        return pltpu.VMEM((self.tokens + KEPT, LANES), jnp.float32)

    def edge(self):
        """Memory for the rows that are handed from block to block."""
        return pltpu.VMEM((KEPT, self.channels), jnp.float32)

    def columns(self, marks: dict[str, Operand]):
        """Memory for the words of the block, each in every lane."""
        return None if marks["words"].array is None else pltpu.VMEM((self.tokens, LANES), jnp.int32)

    def cost(self, operations: int, *moved) -> pl.CostEstimate:
        """Of a kernel with so many operations for each token and channel."""
        elements = self.B * self.S * self.E
        size = sum(x.size * x.dtype.itemsize for x in moved if x is not None)
        return pl.CostEstimate(flops=operations * elements, transcendentals=3 * elements, bytes_accessed=size)
