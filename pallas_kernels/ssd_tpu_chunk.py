"""What the TPU kernels of state-space duality share: one chunk of tokens, its decays, and the step of the states across it.

*Rows* have tokens along lanes and heads along sublanes: step sizes and decays are made there, and there they cost next to
nothing. Everything else has tokens along sublanes, as the arrays lie in memory, and heads along lanes. A row becomes a column by
spreading it over sublanes and transposing that.

Sums of log decays may be -1000 where neighbours differ by 0.001. They are taken in two parts, of which the first adds up without
rounding; for bf16 operands the parts are added where both passes round the decays afterwards anyway.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.mosaic_tpu import dot
from pallas_kernels.scan_tpu import LOG2E, exp, softplus
from pallas_kernels.ssd_tpu_cut import LANES, Cut

# The first part of a sum of log decays is a multiple of it, exact down to -32,768.
GRID = 2.0**-9
# Exponents of pairs that are masked are cut off here, so that 0 times their power of 2 is 0.
MOST = 120.0
# Tiles whose products are in one piece of straight-line code.
TOGETHER = 4


def step_sizes(before: jax.Array, spec) -> tuple[jax.Array, jax.Array]:
    """(dt within the limits, d dt / d before) of what stands in front of the softplus."""
    dt = softplus(before) if spec.dt_softplus else before
    slope = exp(before - dt) if spec.dt_softplus else jnp.ones_like(before)
    low, high = spec.dt_limit
    slope = jnp.where((dt < low) | (dt > high), 0.0, slope)
    return jnp.where(dt < low, low, jnp.where(dt > high, high, dt)), slope


def before(refs, cut: Cut) -> jax.Array:
    """What stands in front of the softplus: (heads of every chunk, tokens), chunk under chunk."""
    rows = jnp.concatenate([refs.dt[:, c * cut.chunk : (c + 1) * cut.chunk] for c in range(cut.chunks)])
    return rows if refs.bias is None else rows + _for_chunks(refs.bias, cut)


def rates(refs, cut: Cut) -> jax.Array:
    """A beside the rows of `before`."""
    return _for_chunks(refs.A, cut)


def _for_chunks(ref, cut: Cut) -> jax.Array:
    return jnp.concatenate([ref[...]] * cut.chunks)


def codes(refs, cut: Cut, which: int) -> jax.Array:
    """A row of codes for the rows of `before`."""
    row = refs.codes[which : which + 1, :]
    shape = cut.heads, cut.chunk
    return jnp.concatenate([jnp.broadcast_to(row[:, c * cut.chunk : (c + 1) * cut.chunk], shape) for c in range(cut.chunks)])


def fill_rows(refs, cut: Cut, spec) -> None:
    """Fills what memory there is for rows, those of all chunks at once because each step waits for the one before.

    `dt`; `whole` and `part`, whose sum is s_i, the log2 decay from the chunk's start to token i inclusive; `s`, the sum; `past`
    = s_i - log2 dt_i; `left` = exp2(s_i), what is left of the state in front of the chunk; `ahead` = exp2(s_C - s_j), what is
    left of token j behind it; `ahead_dt`, times dt_j; `started`, how many documents have by a token. Across the start of one
    nothing is left.
    """
    dt = step_sizes(before(refs, cut), spec)[0]
    if refs.codes is not None:
        dt = jnp.where(codes(refs, cut, 1) > 0, dt, 0.0)
    log = dt * (rates(refs, cut) * LOG2E)
    rounded = jnp.round(log / GRID) * GRID
    whole, part = prefix_sums(rounded), prefix_sums(log - rounded)
    last = lambda x: x[:, cut.chunk - 1 :]
    left, ahead = jnp.exp2(whole + part), jnp.exp2((last(whole) - whole) + (last(part) - part))
    if refs.codes is not None:
        refs.row_started[...] = started = prefix_sums(codes(refs, cut, 0))
        left, ahead = jnp.where(started == 0, left, 0.0), jnp.where(started == last(started), ahead, 0.0)
    past = whole + part - jnp.where(dt > 0, jnp.log2(jnp.where(dt > 0, dt, 1.0)), -jnp.inf)
    found = dict(dt=dt, whole=whole, part=part, left=left, ahead=ahead, ahead_dt=ahead * dt, past=past, s=whole + part)
    for name, x in found.items():
        if (ref := getattr(refs, f"row_{name}", None)) is not None:
            ref[...] = x


class Chunk:
    """Chunk `c` of a program's block, whose rows are there."""

    def __init__(self, refs, cut: Cut, c):
        self.refs, self.cut, self.c = refs, cut, c
        self.tokens = pl.ds(pl.multiple_of(c * cut.chunk, cut.chunk), cut.chunk)
        self.codes = None if refs.codes is None else refs.codes[:, self.tokens]
        if self.codes is not None:
            refs.keep[...] = jnp.broadcast_to(self.codes[1:], (LANES, cut.chunk)).T

    def visible(self, turned: bool) -> jax.Array:
        """bool (i, j): j <= i, of one document. (j, i) if `turned`."""
        C = self.cut.chunk
        i, j = (lax.broadcasted_iota(jnp.int32, (C, C), dim) for dim in ((1, 0) if turned else (0, 1)))
        seen = j <= i
        if self.codes is not None:
            seen = seen & (self.row("started", 0) == self.column("started", 0))
        return seen

    def load(self, ref, lanes=slice(None)) -> jax.Array:
        """The chunk of an array of tokens as an operand of products, 0 at what is no token."""
        x = ref[self.tokens, lanes]
        if self.codes is not None:
            keep = self.refs.keep[...]
            keep = keep if x.shape[1] == LANES else jnp.broadcast_to(keep[:, :1], x.shape)
            x = jnp.where(keep > 0, x.astype(jnp.float32), 0.0)
        return x.astype(self.cut.kind)

    def _at(self, head) -> pl.Slice:
        return pl.ds(self.c * self.cut.heads + head, 1)

    def row(self, name: str, head) -> jax.Array:
        """(1, tokens) of one head."""
        return getattr(self.refs, f"row_{name}")[self._at(head), :]

    def put(self, name: str, head, row_1c: jax.Array) -> None:
        """The other way."""
        getattr(self.refs, f"row_{name}")[self._at(head), :] = row_1c

    def heads(self, t) -> list:
        """The heads of tile t."""
        return [t * self.cut.per_tile + which for which in range(self.cut.per_tile)]

    def column(self, name: str, head) -> jax.Array:
        """(tokens, tokens): a number of token i in all of row i."""
        return jnp.broadcast_to(self.row(name, head), (self.cut.chunk, self.cut.chunk)).T

    def columns(self, name: str, t) -> jax.Array:
        """(tokens, lanes of tile t): a head's number of a token in all lanes of the head."""
        shape = self.cut.K, self.cut.chunk
        return jnp.concatenate([jnp.broadcast_to(self.row(name, head), shape) for head in self.heads(t)]).T

    def sums(self, x_cl: jax.Array) -> list[jax.Array]:
        """(1, tokens) for each head of a tile: sums over the lanes of a head."""
        which, lane = (lax.broadcasted_iota(jnp.int32, (8, LANES), dim) for dim in (0, 1))
        found = dot(jnp.where(lane // self.cut.K == which, 1.0, 0.0).astype(self.cut.kind), x_cl.astype(self.cut.kind), 1, 1)
        return [found[head : head + 1] for head in range(self.cut.per_tile)]

    def sums_of_pairs(self, x_ji: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(sums over j, sums over i), (1, tokens): of the same rounded numbers, so that they cancel where they should."""
        ones = jnp.ones((8, self.cut.chunk), self.cut.kind)
        x_ji = x_ji.astype(self.cut.kind)
        return dot(ones, x_ji, 1, 0)[:1], dot(ones, x_ji, 1, 1)[:1]

    def only(self, x_cl: jax.Array) -> jax.Array:
        """A tile for each of its heads, one above the other, zero in the lanes of the others."""
        if self.cut.per_tile == 1:
            return x_cl
        head, wide = lax.broadcasted_iota(jnp.int32, x_cl.shape, 1) // self.cut.K, x_cl.astype(jnp.float32)
        return jnp.concatenate([jnp.where(head == which, wide, 0.0) for which in range(self.cut.per_tile)]).astype(x_cl.dtype)

    def step(self, t, h_Nl: jax.Array, x_cl: jax.Array, left_cl: jax.Array) -> jax.Array:
        """The state behind the chunk; `turned_B` holds B. Exact to fp32 whatever the operands are."""
        scaled = self.columns("ahead_dt", t) * x_cl.astype(jnp.float32)
        return left_cl[self.cut.chunk - 1 :] * h_Nl + product(self.refs.turned_B[...], scaled)

    def steps(self, read, write) -> None:
        """The states of all heads across the chunk: from `read(lanes)` to `write(lanes, state)`."""

        def compute(t):
            lanes = lanes_of(t)
            yield self.step(t, read(lanes), self.load(self.refs.x, lanes), self.columns("left", t))

        over_tiles(self.cut, compute, lambda t, state: write(lanes_of(t), state))


def over_tiles(cut: Cut, compute, store, store_sums=None) -> None:
    """store(t, result of compute(t)) for every tile: some at once, whose results are all computed before any is stored.

    A tile alone is a chain of products that wait for each other, and what is stored has to be before what is loaded behind it.
    So `compute` is a generator: it yields between phases, of which each is done for all of those tiles, in the order in which
    the matrix units will take them, and its result last.

    Args:
      cut: has the number of tiles.
      compute: t -> generator.
      store: takes a tile and its result.
      store_sums: takes the results of tiles computed together; None for nothing.
    """
    together = max(n for n in range(1, min(TOGETHER, cut.tiles) + 1) if cut.tiles % n == 0)

    def some(i, _):
        tiles = [i * together + n for n in range(together)]
        found = [*zip(*(compute(t) for t in tiles), strict=True)][-1]
        for t, x in zip(tiles, found, strict=True):
            store(t, x)
        if store_sums is not None:
            store_sums(found)

    lax.fori_loop(0, cut.tiles // together, some, None)


def prefix_sums(x_Hc: jax.Array, reverse: bool = False) -> jax.Array:
    """Sums over the tokens up to each, itself among them; in reverse, from each on. A product with a triangle of ones."""
    C = x_Hc.shape[1]
    i, j = (lax.broadcasted_iota(jnp.int32, (C, C), dim) for dim in (0, 1))
    return dot(x_Hc, jnp.where(i >= j if reverse else i <= j, 1.0, 0.0), 1, 0)


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """a @ b of an operand that is exact and one in fp32, to fp32 precision: with a bf16 operand three products of the unit."""
    if a.dtype == jnp.float32:
        return dot(a, b, 1, 0)
    parts = []
    for _ in range(3):
        parts.append(b.astype(a.dtype))
        b = b - parts[-1].astype(jnp.float32)
    return functools.reduce(jnp.add, [dot(a, part, 1, 0) for part in reversed(parts)])


def turn(x: jax.Array) -> jax.Array:
    """The transpose, by way of fp32."""
    return x.astype(jnp.float32).T.astype(x.dtype)


def lanes_of(t) -> pl.Slice:
    """Of tile t."""
    return pl.ds(pl.multiple_of(t * LANES, LANES), LANES)
