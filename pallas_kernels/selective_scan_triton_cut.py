"""How the Triton kernels of the selective scan cut their arrays: blocks of channels, segments of a row; operands in that form."""

import math

import jax
import jax.numpy as jnp
import triton

# Tokens between two states that are kept for the backward pass: 1 KiB a token at E=2048, N=16.
CHUNK = 128
# Tokens whose states the backward pass has in registers at a time; tokens of the other kernels between two branches.
GROUP, UNROLLED = 4, 8
# Programs, each of one warp, that keep a large GPU busy: 132 processors of 4 schedulers with 4 warps, and with 2 where a warp
# takes all the registers that it can address.
PROGRAMS, BACKWARD_PROGRAMS = 2048, 1024
# Tokens of a segment at least.
SHORTEST = 1024
# Channels at most whose parts of dB and dC one program adds up.
MOST_CHANNELS = 256


class Cut:
    """The sizes of one call, and its small arrays padded to them.

    N and E are padded with states and channels that stay 0: to a power of two, and to whole blocks.
    """

    def __init__(self, inputs, spec):
        self.inputs, self.spec = inputs, spec
        self.B, self.S, self.E = inputs.u_BSE.shape
        self.states = inputs.A_EN.shape[1]
        self.N = max(8, triton.next_power_of_2(self.states))  # with 4 the backward pass would take 84 KiB of shared memory
        self.chunks = -(-self.S // CHUNK)
        # All states of a channel are in one thread, and of that two channels as long as both fit the registers.
        self.neighbours = 2 if self.N <= 16 else 1
        self.block = 64 if self.N <= 16 else 32 if self.N <= 32 else 16
        self.E_padded = -(-self.E // self.block) * self.block  # whole blocks of the backward pass too, which are no wider
        # Backward a thread holds 4 states of 4 channels: sums over channels and sums over states then both cross few threads.
        self.backward_block = 512 // self.N

    def segments(self, programs: int, wanted: int) -> tuple[int, int]:
        """(tokens of a segment, segments of a row) where every segment of every row takes that many programs."""
        parts = max(1, wanted // (self.B * programs))
        tokens = -(-max(SHORTEST, -(-self.S // parts)) // CHUNK) * CHUNK
        return tokens, -(-self.S // tokens)

    def forward_segments(self) -> tuple[int, int]:
        return self.segments(-(-self.E // self.block), PROGRAMS)

    def backward_segments(self) -> tuple[int, int, int]:
        """(tokens of a segment, segments of a row, blocks of channels that a program adds up dB and dC over).

        Parts of dB and dC are 8 N bytes for each token and program beside each other, so a program takes several blocks where
        segments make programs enough.
        """
        blocks = -(-self.E // self.backward_block)
        together = 1
        enough = lambda together: self.B * (blocks // together) * max(1, self.S // SHORTEST) >= BACKWARD_PROGRAMS
        while 2 * together * self.backward_block <= MOST_CHANNELS and enough(2 * together):
            together *= 2
        programs = -(-blocks // together)
        return *self.segments(programs, BACKWARD_PROGRAMS), together

    def sizes(self) -> dict[str, int]:
        """Constants of every kernel."""
        return dict(S=self.S, E=self.E, E_PADDED=self.E_padded, N=self.N, SOFTPLUS=self.spec.dt_softplus)

    def rates(self) -> jax.Array:
        """A in powers of two, N E, never 0."""
        rates_NE = jnp.minimum(self.inputs.A_EN.astype(jnp.float32).T * math.log2(math.e), -1e-27)
        return self._pad(rates_NE, -1.0)

    def slowest(self) -> jax.Array:
        """The rate of the state of each channel that decays least, E."""
        return self._pad(self.rates()[: self.states, : self.E].max(0), -1.0)

    def map(self, x_BSN: jax.Array, tokens: int = 0) -> jax.Array:
        """B or C in fp32, with zeros for the states and `tokens` that are not there."""
        return jnp.pad(x_BSN.astype(jnp.float32), ((0, 0), (0, tokens), (0, self.N - self.states)))

    def groups(self, B_BSN: jax.Array, C_BSN: jax.Array, tokens: int) -> jax.Array:
        """B and C of every GROUP tokens behind each other, as the backward kernel reads them; `tokens` fill the last chunk."""
        split = lambda x_BSN: self.map(x_BSN, tokens).reshape(self.B, -1, GROUP, self.N)
        return jnp.stack([split(B_BSN), split(C_BSN)], axis=2)

    def of_groups(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(B, C) back from `groups`."""
        return tuple(x[:, :, i].reshape(self.B, -1, self.N)[:, : self.S, : self.states] for i in range(2))

    def channels(self, x_E: jax.Array | None) -> jax.Array | None:
        return None if x_E is None else self._pad(x_E.astype(jnp.float32))

    def state(self, x_BEN: jax.Array) -> jax.Array:
        return self._pad(jnp.swapaxes(x_BEN, 1, 2))

    def of_state(self, x_BNE: jax.Array) -> jax.Array:
        """... E N."""
        return jnp.swapaxes(x_BNE[..., : self.states, : self.E], -1, -2)

    def codes(self, tokens: int = 0) -> jax.Array | None:
        """What each token is, as in `selective_scan_triton_token`."""
        if self.inputs.marks is None:
            return None
        reset_BS, real_BS = self.inputs.marks
        return jnp.pad(jnp.where(reset_BS, 2, real_BS).astype(jnp.int8), ((0, 0), (0, tokens)))

    def by_segment(self, segments: int, *dims: int) -> jax.ShapeDtypeStruct:
        """fp32 for every segment of every row."""
        return jax.ShapeDtypeStruct((self.B, segments, *dims), jnp.float32)

    def state_shape(self, *dims: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.B, *dims, self.N, self.E_padded), jnp.float32)

    def _pad(self, x: jax.Array, value: float = 0.0) -> jax.Array:
        """The last dim to E_padded; one before it to N where there is one."""
        by = [(0, 0)] * (x.ndim - 2) + ([(0, self.N - x.shape[-2])] if x.ndim > 1 else []) + [(0, self.E_padded - self.E)]
        return jnp.pad(x, by, constant_values=value)
