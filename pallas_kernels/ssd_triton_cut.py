"""How a call of the Triton kernels of state-space duality is divided among programs."""

import jax
import jax.numpy as jnp
import triton.language as tl

from pallas_kernels import interpret

# Tokens of a chunk: the rows that a warpgroup gives to a matrix instruction of Hopper.
CHUNK = 64
# Chunks of a block. The state in front of every block is kept: 4 N / (CHUNK * CHUNKS) bytes for a token and channel.
CHUNKS = 4
# Numbers of a head that one program takes. Wider heads are several programs: two warpgroups on one would compute its pairs twice.
WIDTH = 64
# Programs that keep a large GPU busy: 132 processors, two on each at a time, four times.
PROGRAMS = 1024
# Blocks of a segment at least: less, and finding what is in front of it would take longer than computing it.
LEAST = 4
# Numbers of x in a stripe: at N=128 in bf16 8 bytes for each are states and gradients of states, 2 are dW.
STRIPE = 2**27
# Of the second dim of a grid.
MOST_CHUNKS = 2**15


class Cut:
    """How one call is divided.

    Attributes:
      B, S, H, K, G, N: sizes of the call.
      kind: dtype of the operands of products: fp32 where any array of tokens is.
      width: numbers of a head that one program takes.
      block, blocks: tokens of a block, blocks of a row.
      stripe, stripes: blocks of a stripe, of which the backward pass takes one at a time, and their number.
    """

    def __init__(self, inputs):
        (self.B, self.S, self.H, self.K), (self.G, self.N) = inputs.x_BSHK.shape, inputs.B_BSGN.shape[2:]
        wide = any(x.dtype == jnp.float32 for x in (inputs.x_BSHK, inputs.B_BSGN, inputs.C_BSGN))
        self.kind = jnp.dtype(jnp.float32 if wide else jnp.bfloat16)
        self.packed = inputs.marks is not None
        self.width = min(self.K, WIDTH)
        self.block = CHUNK * CHUNKS
        self.blocks = -(-self.S // self.block)
        most = min(STRIPE // (self.B * self.H * self.K * self.block), MOST_CHUNKS // CHUNKS)
        self.stripes = -(-self.blocks // max(1, most))
        self.stripe = -(-self.blocks // self.stripes)

    @property
    def heads(self) -> int:
        """Programs beside each other for all heads."""
        return self.H * self.K // self.width

    def segments(self, blocks: int) -> tuple[int, int]:
        """(blocks of a segment, segments) where so many blocks of every row are computed at once."""
        wanted = max(1, PROGRAMS // (self.B * self.heads))
        size = max(LEAST, -(-blocks // wanted))
        return size, -(-blocks // size)

    def sizes(self) -> dict:
        """Constants of every kernel."""
        kind = tl.float32 if self.kind == jnp.float32 else tl.bfloat16
        # Triton's interpreter has no products of bf16: what has been rounded to it is multiplied in fp32.
        unit = tl.float32 if interpret.mode() else kind
        # Tiles of so many chunks or heads are in shared memory, or on their way there.
        stages = 3 if self.kind == jnp.bfloat16 else 2
        sizes = dict(S=self.S, H=self.H, G=self.G, K=self.K, N=self.N, WIDTH=self.width, Q=CHUNK)
        return sizes | dict(PACKED=self.packed, KIND=kind, UNIT=unit, STAGES=stages)

    @property
    def warps(self) -> int:
        """Of a program: one warpgroup, or two where a state would fill the registers of one."""
        return 4 if self.N <= 128 and self.kind == jnp.bfloat16 else 8

    def states(self, *dims: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
        """A state (N, K) for each row and head, and each of `dims`."""
        return jax.ShapeDtypeStruct((self.B, self.H, *dims, self.N, self.K), dtype)

    def by_head(self, *dims: int) -> jax.ShapeDtypeStruct:
        """fp32 for each row and head, and each of `dims`."""
        return jax.ShapeDtypeStruct((self.B, self.H, *dims), jnp.float32)

    @property
    def edge(self) -> jax.ShapeDtypeStruct:
        """A state as users have it."""
        return jax.ShapeDtypeStruct((self.B, self.H, self.K, self.N), jnp.float32)
