"""What the TPU kernels of the selective scan share: the way between rows of tokens and tiles of channels.

*Rows*: 16 tokens along sublanes, 128 channels along lanes, as the arrays lie in memory; all that needs no state is computed
there. *Tiles*: 1,024 channels of one token as one register (8, 128), and a register for each of the N states; the recurrence
runs there. Between the two stands memory: rows are stored, and tiles are loaded with a stride over rows. `B` and `C` of a
token are needed in every lane of a register, and are spread over the lanes once a chunk, for all tiles.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.mosaic_tpu import dot
from pallas_kernels.scan_tpu import LOG2E, quick_softplus
from pallas_kernels.selective_scan_tpu_cut import GROUPS, LANES, SLAB, STRIDE, TILE, Cut

# Tokens in rows: what one register of bf16 holds.
ROWS = 16
# Parts of a loop in one basic block.
UNROLLED = 4


# Rows.


def over(count: int, body: Callable, carry=None):
    """body(i, carry) for i in range(count); several in one basic block, or their latencies would add up."""
    unrolled = math.gcd(count, UNROLLED)

    def some(i, carry):
        for part in range(unrolled):
            carry = body(i * unrolled + part, carry)
        return carry

    return lax.fori_loop(0, count // unrolled, some, carry)


def over_tokens(cut: Cut, body: Callable, states: tuple, reverse: bool = False) -> tuple:
    """The states after body(slab, token of the slab, list of states) has changed them for every token of the chunk."""
    slabs = cut.chunk // 8
    order = [(part, t) for part in range(math.gcd(slabs, UNROLLED)) for t in range(8)]
    unrolled = len(order) // 8

    def some(i, states):
        states = list(states)
        first = (slabs // unrolled - 1 - i if reverse else i) * unrolled
        for part, t in reversed(order) if reverse else order:
            body(first + part, t, states)
        return tuple(states)

    return lax.fori_loop(0, slabs // unrolled, some, states)


def rows(ref, i, j: int) -> jax.Array:
    """Tokens i of group of channels j, fp32."""
    return ref[tokens_of(i), lanes_of(j)].astype(jnp.float32)


def tokens_of(i) -> pl.Slice:
    return pl.ds(pl.multiple_of(i * ROWS, ROWS), ROWS)


def lanes_of(j: int) -> slice:
    return slice(j * LANES, (j + 1) * LANES)


def put(ref, i, j: int, x: jax.Array) -> None:
    """Rows into memory that is read as tiles at `token`."""
    for half in (0, 1):
        ref[pl.ds((2 * i + half) * SLAB + j * STRIDE, 8), :] = x[half * 8 : half * 8 + 8]


def take(ref, i, j: int) -> jax.Array:
    """Rows of what was written by tiles."""
    return jnp.concatenate([ref[pl.ds((2 * i + half) * SLAB + j * STRIDE, 8), :] for half in (0, 1)])


def real_rows(refs, i) -> jax.Array | None:
    """bool: which of tokens i are tokens. None if all are."""
    return None if refs.columns is None else refs.columns[tokens_of(i), :] >= 0


def only(keep: jax.Array | None, x: jax.Array) -> jax.Array:
    """x where `keep` holds, 0 elsewhere, even for what is not a number."""
    return x if keep is None else jnp.where(keep, x, 0.0)


def prepare(refs, cut: Cut, k, softplus_of_dt: bool) -> None:
    """Fills what there is of the memory that the recurrence and the rows behind it read.

    dt; x = dt u; dy before the gate; the derivatives that ddt and dz are multiplied with (dz's by dy too); the maps.
    """
    # Two units at once: each alone would take longer than the stores of both.
    maps = (_by_broadcast, refs.B, refs.turned_B, refs.across_B), (_by_product, refs.C, refs.turned_C, refs.across_C)
    maps = [one for one in maps if one[-1] is not None]

    @pl.when(k == 0)
    def turn():
        if refs.columns is not None:
            refs.columns[...] = jnp.broadcast_to(refs.codes[...], (LANES, cut.chunk)).T
        for _, given, turned, _ in maps:
            turned[...] = given[...].astype(jnp.float32).T.astype(given.dtype)

    group = (pl.program_id(1) * pl.num_programs(3) + k) * GROUPS

    def of_rows(i, _=None):
        real = real_rows(refs, i)
        for j in range(GROUPS):
            keep = real
            if cut.E % TILE:
                inside = jnp.full((ROWS, LANES), group + j) < cut.E // LANES
                keep = inside if real is None else real & inside
            before = rows(refs.dt, i, j)
            before = before if refs.bias is None else before + refs.bias[k, :, lanes_of(j)]
            dt = only(keep, quick_softplus(before) if softplus_of_dt else before)
            put(refs.spread_dt, i, j, dt)
            if refs.slope_dt is not None:  # sigmoid(x) = exp(x - softplus(x)), which is as good for small steps as for large
                put(refs.slope_dt, i, j, jnp.exp2((before - dt) * LOG2E))
            if refs.spread_x is not None:
                x = dt * rows(refs.u, i, j)
                put(refs.spread_x, i, j, only(keep, x) if cut.ragged else x)
            if refs.spread_dy is not None:
                dy = only(keep, rows(refs.dy, i, j))
                if refs.z is not None:
                    z = rows(refs.z, i, j)
                    silu, slope = gate(only(keep, z) if cut.ragged else z)
                    if refs.slope_z is not None:
                        put(refs.slope_z, i, j, dy * slope)
                    dy = dy * silu
                put(refs.spread_dy, i, j, dy)

    unrolled = math.gcd(cut.chunk // ROWS, UNROLLED)

    def with_maps(i, _):
        parts = [i * unrolled + part for part in range(unrolled)]
        for part in parts:
            for spread, given, turned, across in maps:
                spread(turned, across, part, cut.N, given.dtype)
        for part in parts:
            of_rows(part)

    pl.when(k == 0)(lambda: lax.fori_loop(0, cut.chunk // ROWS // unrolled, with_maps, None))
    pl.when(k != 0)(lambda: over(cut.chunk // ROWS, of_rows))


def _by_broadcast(turned, across, i, N: int, dtype) -> None:
    """Tokens i of a map into every lane, by the unit that moves lanes."""
    for n in range(N):
        x = jnp.broadcast_to(turned[tokens_of(i), :][:, n : n + 1].astype(jnp.float32), (ROWS, LANES))
        for half in (0, 1):
            across[pl.ds(((2 * i + half) * N + n) * 8, 8), :] = x[half * 8 : half * 8 + 8]


def _by_product(turned, across, i, N: int, dtype) -> None:
    """The same by the matrix unit: a product with ones of the map with all states but one set to zero, which is exact."""
    for half in (0, 1):
        x = turned[tokens_of(i), :].astype(jnp.float32)[half * 8 : half * 8 + 8]
        state = lax.broadcasted_iota(jnp.int32, x.shape, 1)
        one_state = jnp.concatenate([jnp.where(state == n, x, 0.0) for n in range(N)]).astype(dtype)
        at = pl.multiple_of((2 * i + half) * N * 8, 8)
        across[pl.ds(at, N * 8), :] = dot(one_state, jnp.ones((x.shape[1], LANES), dtype), 1, 0)


def gate(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """silu(z) and its derivative, by sigmoid(z) = (1 + tanh(z / 2)) / 2, which is one instruction where 1 / (1 + e) is ten."""
    half = 0.5 * z
    bent = jnp.tanh(half)
    above = 1 + bent
    return half * above, 0.5 * above * (1 + half * (1 - bent))


# Tiles.


def of_tile(k) -> pl.Slice:
    """Where tile k of the part stands among registers."""
    return pl.ds(pl.multiple_of(k * GROUPS, GROUPS), GROUPS)


def token(q, t: int) -> pl.Slice:
    """Where the channels of token t of slab q stand in memory that rows were put into."""
    return pl.ds(q * SLAB + t, GROUPS, stride=STRIDE)


def everywhere(ref, row) -> jax.Array:
    """A row of memory in every sublane."""
    return jnp.broadcast_to(ref[pl.ds(row, 1), :], (GROUPS, LANES))


def step_size(refs, q, t: int) -> jax.Array:
    """dt of a token for its decay: so long that nothing is left where a document starts."""
    dt = refs.spread_dt[token(q, t), :]
    return dt if refs.columns is None else jnp.maximum(dt, everywhere(refs.columns, q * 8 + t))
