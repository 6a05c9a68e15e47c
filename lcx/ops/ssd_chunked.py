"""State-space duality in chunks, in plain `jnp`: products of matrices within a chunk, a state from chunk to chunk.

With s the inclusive sum of dt A in a chunk, i and j tokens of it, and h the state in front of it:

    y_i = sum_{j<=i} (C_i . B_j) exp(s_i - s_j) dt_j x_j + exp(s_i) h C_i
    h'  = exp(s_C) h + sum_j exp(s_C - s_j) dt_j x_j (x) B_j

where a decay across the start of a document is 0. Kept for the backward pass is the state in front of every chunk; from the last
chunk to the first, each is computed again and differentiated. Source: Dao and Gu (2024), section 6.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lcx.ops.recurrence import EXACT, Affine, pad_marks, pad_tokens
from lcx.ops.ssd import Inputs, steps_BSH

# A chunk's own work grows with its length, that on the state falls: they balance near C = N (2 C K against 4 K N operations
# a token and head). Matrix units want 64 at least; over 256 the decays between pairs of tokens dominate.
CHUNKS = (64, 256)
# Sums of log decays are taken in two parts; the first in multiples of this, which fp32 adds up without rounding beyond -30,000.
GRID = 2.0**-9


def refuse(spec, shapes, dtypes, device_kind):
    """Runs everywhere."""
    return None


def chunk_of(tokens: int, state_size: int, asked: int | None = None) -> int:
    """Tokens in a chunk for rows of `tokens` and N = `state_size`; equal chunks but for padding behind the last."""
    least, most = CHUNKS
    largest = asked or min(max(-(-state_size // least) * least, least), most)
    return -(-tokens // -(-tokens // largest))


def _cut(inputs: Inputs, spec) -> tuple[Inputs, int, int]:
    """(inputs whose tokens are a whole number of chunks, their number, tokens in each)."""
    B, S = inputs.x_BSHK.shape[:2]
    C = chunk_of(S, inputs.B_BSGN.shape[3], spec.chunk)
    n = -(-S // C)
    marked = pad_marks(inputs.marks, (B, S), n * C - S)
    tokens = {name: pad_tokens(getattr(inputs, name), n * C - S) for name in BY_TOKEN}
    return inputs._replace(**tokens, marks=marked), n, C


BY_TOKEN = ("x_BSHK", "dt_BSH", "B_BSGN", "C_BSGN")


def _chunk(inputs: Inputs, i, C) -> Inputs:
    """The inputs of chunk i."""
    take = lambda x: lax.dynamic_slice_in_dim(x, i * C, C, 1)
    tokens = {name: take(getattr(inputs, name)) for name in BY_TOKEN}
    return inputs._replace(**tokens, marks=jax.tree.map(take, inputs.marks))


def _put(buffer_BSx, x_BCx, i):
    return lax.dynamic_update_slice_in_dim(buffer_BSx, x_BCx.astype(buffer_BSx.dtype), i * x_BCx.shape[1], 1)


@jax.custom_vjp
def _log_between_BHCC(log_BCH):
    """Sum of the log decays of the tokens j < k <= i, at [i, j]; only j <= i has a meaning.

    Neighbours differ little and the sums may be -1000, so that the difference of two plain sums would keep few of its digits.
    Gradients have the same trouble in reverse; each is a sum over the pairs around its token, and never a difference.
    """
    whole = jnp.round(log_BCH / GRID) * GRID
    difference = lambda s_BCH: jnp.moveaxis(s_BCH[:, :, None] - s_BCH[:, None], 3, 1)
    return difference(jnp.cumsum(whole, axis=1)) + difference(jnp.cumsum(log_BCH - whole, axis=1))


def _log_between_backward(_, d_BHCC):
    C = d_BHCC.shape[2]
    lower = jnp.tril(jnp.ones((C, C), jnp.float32))
    from_k_on = jnp.einsum("ik,bhij->bhkj", lower, d_BHCC, precision=EXACT)
    before_k = (lower - jnp.eye(C, dtype=jnp.float32))[None, None]
    return (jnp.swapaxes((from_k_on * before_k).sum(3), 1, 2),)


_log_between_BHCC.defvjp(lambda log_BCH: (_log_between_BHCC(log_BCH), None), _log_between_backward)


class _Decays(NamedTuple):
    """Log decay of each token of one chunk, and how many documents have started by it (None without marks)."""

    log_BCH: jax.Array
    started_BC: jax.Array | None

    @classmethod
    def of(cls, inputs: Inputs, dt_BCH) -> "_Decays":
        started = None if inputs.marks is None else jnp.cumsum(inputs.marks.reset_BS, axis=1, dtype=jnp.int32)
        return cls(dt_BCH * inputs.A_H.astype(jnp.float32)[None, None], started)

    def between_BHCC(self):
        """exp(s_i - s_j) for j <= i of one document, else 0."""
        log = _log_between_BHCC(self.log_BCH)
        holds = jnp.tril(jnp.ones(log.shape[2:], bool))[None, None]
        if self.started_BC is not None:
            holds = holds & (self.started_BC[:, :, None] == self.started_BC[:, None])[:, None]
        return _exp_where(jnp.broadcast_to(holds, log.shape), log)

    def from_start_BCH(self):
        """exp(s_i): what is left of the state in front of the chunk."""
        holds = None if self.started_BC is None else (self.started_BC == 0)[..., None]
        return _exp_where(holds, jnp.cumsum(self.log_BCH, axis=1))

    def to_end_BCH(self):
        """exp(s_C - s_j): what is left of token j behind the chunk."""
        later = jnp.pad(self.log_BCH[:, 1:], ((0, 0), (0, 1), (0, 0)))
        holds = None if self.started_BC is None else (self.started_BC == self.started_BC[:, -1:])[..., None]
        return _exp_where(holds, lax.cumsum(later, axis=1, reverse=True))


def _exp_where(holds, log):
    """exp where it holds, else 0. Masked before: above the diagonal exp may overflow, and 0 * inf would reach the gradient."""
    return jnp.exp(log if holds is None else jnp.where(holds, log, -jnp.inf))


def _grouped(x_BCHy, G):
    """B C H y -> B C G R y."""
    B, C, H, *rest = x_BCHy.shape
    return x_BCHy.reshape(B, C, G, H // G, *rest)


def _after(h_BHKN, dtx_BCHK, B_BCGN, decays: _Decays):
    """The state behind a chunk."""
    G = B_BCGN.shape[2]
    kept = decays.from_start_BCH()[:, -1][..., None, None] * h_BHKN
    added = jnp.einsum("bcgrk,bcgn->bgrkn", _grouped(decays.to_end_BCH()[..., None] * dtx_BCHK, G), B_BCGN, precision=EXACT)
    return kept + added.reshape(h_BHKN.shape)


def _outputs(inputs: Inputs, h_BHKN, spec):
    """(y_BCHK fp32, the state behind the chunk) of one chunk; differentiable."""
    x, B, C, D = (inputs[i].astype(jnp.float32) for i in (0, 3, 4, 5))
    G, K, N = B.shape[2], x.shape[3], B.shape[3]
    dt = steps_BSH(inputs, spec)
    decays, dtx = _Decays.of(inputs, dt), dt[..., None] * x
    weights = jnp.einsum("bign,bjgn->bgij", C, B, precision=EXACT)[:, :, None]
    between = decays.between_BHCC()
    weights = weights * between.reshape(between.shape[0], G, -1, *between.shape[2:])
    y = jnp.einsum("bgrij,bjgrk->bigrk", weights, _grouped(dtx, G), precision=EXACT).reshape(x.shape)
    state = h_BHKN.reshape(x.shape[0], G, -1, K, N)
    y = y + decays.from_start_BCH()[..., None] * jnp.einsum("bign,bgrkn->bigrk", C, state, precision=EXACT).reshape(x.shape)
    y = y + D[None, None, :, None] * x
    if inputs.marks is not None:
        y = jnp.where(inputs.marks.real_BS[..., None, None], y, 0)
    return y, _after(h_BHKN, dtx, B, decays)


def forward(inputs, initial_state_BHKN, *, spec):
    """See `lcx.ops.ssd`, "Backends". Keeps the state in front of every chunk."""
    S = inputs.x_BSHK.shape[1]
    inputs, n, C = _cut(inputs, spec)

    def chunk(i, carry):
        h, starts, y = carry
        starts = lax.dynamic_update_index_in_dim(starts, h, i, 0)
        y_BCHK, h = _outputs(_chunk(inputs, i, C), h, spec)
        return h, starts, _put(y, y_BCHK, i)

    starts = jnp.zeros((n, *initial_state_BHKN.shape), jnp.float32)
    h, starts, y = lax.fori_loop(0, n, chunk, (initial_state_BHKN, starts, jnp.zeros_like(inputs.x_BSHK)))
    return y[:, :S], h, starts


def backward(inputs, residuals, dy_BSHK, dfinal_state_BHKN, *, spec):
    """See `lcx.ops.ssd`, "Backends"."""
    given, S = inputs, inputs.x_BSHK.shape[1]
    inputs, n, C = _cut(inputs, spec)
    dy_BSHK = pad_tokens(dy_BSHK, n * C - S)

    def chunk(k, carry):
        i = n - 1 - k
        g, total, by_token = carry
        part = _chunk(inputs, i, C)
        marked, wide = part.marks, jax.tree.map(lambda x: x.astype(jnp.float32), part._replace(marks=None))
        run = lambda arrays, h: _outputs(arrays._replace(marks=marked), h, spec)
        dy = lax.dynamic_slice_in_dim(dy_BSHK, i * C, C, 1).astype(jnp.float32)
        found, g = jax.vjp(run, wide, residuals[i])[1]((dy, g))
        by_token = {name: _put(buffer, getattr(found, name), i) for name, buffer in by_token.items()}
        return g, {name: sum_ + getattr(found, name) for name, sum_ in total.items()}, by_token

    by_token = {name: jnp.zeros_like(getattr(inputs, name)) for name in BY_TOKEN}
    names = [name for name in ("A_H", "D_H", "dt_bias_H") if getattr(inputs, name) is not None]
    total = {name: jnp.zeros(getattr(inputs, name).shape, jnp.float32) for name in names}
    g, total, by_token = lax.fori_loop(0, n, chunk, (dfinal_state_BHKN, total, by_token))
    gradients = {name: x[:, :S] for name, x in by_token.items()}
    gradients |= {name: x.astype(getattr(given, name).dtype) for name, x in total.items()}
    return given._replace(**gradients, marks=None), g


def _stretch(inputs, spec, reverse, chunk_state):
    """The whole stretch as a map: `chunk_state(state, chunk's inputs, dt, decays, i)` from chunk to chunk, and the sum of dt."""
    (B, _, H, K), N = inputs.x_BSHK.shape, inputs.B_BSGN.shape[3]
    inputs, n, C = _cut(inputs, spec)

    def chunk(k, carry):
        state, elapsed_BH = carry
        i = n - 1 - k if reverse else k
        part = _chunk(inputs, i, C)
        dt = steps_BSH(part, spec)
        ended = 0.0 if part.marks is None else jnp.where(part.marks.reset_BS.any(1), jnp.inf, 0.0)[:, None]
        return chunk_state(state, part, dt, _Decays.of(part, dt), i), elapsed_BH + dt.sum(1) + ended

    start = jnp.zeros((B, H, K, N), jnp.float32), jnp.zeros((B, H), jnp.float32)
    state, elapsed_BH = lax.fori_loop(0, n, chunk, start)
    return Affine(elapsed_BH[..., None, None], state)


def summary(inputs, *, spec):
    """See `lcx.ops.ssd`, "Backends"."""

    def chunk_state(h, part, dt, decays, i):
        x, B = part.x_BSHK.astype(jnp.float32), part.B_BSGN.astype(jnp.float32)
        return _after(h, dt[..., None] * x, B, decays)

    return _stretch(inputs, spec, False, chunk_state)


def reverse_summary(inputs, dy_BSHK, *, spec):
    """See `lcx.ops.ssd`, "Backends"."""
    _, n, C = _cut(inputs, spec)
    dy_BSHK = pad_tokens(dy_BSHK, n * C - dy_BSHK.shape[1])

    def chunk_state(g, part, dt, decays, i):
        C_BCGN = part.C_BSGN.astype(jnp.float32)
        left, dy = decays.from_start_BCH(), lax.dynamic_slice_in_dim(dy_BSHK, i * C, C, 1).astype(jnp.float32)
        if part.marks is not None:
            dy = jnp.where(part.marks.real_BS[..., None, None], dy, 0)
        added = jnp.einsum("bcgrk,bcgn->bgrkn", _grouped(left[..., None] * dy, C_BCGN.shape[2]), C_BCGN, precision=EXACT)
        return left[:, -1][..., None, None] * g + added.reshape(g.shape)

    return _stretch(inputs, spec, True, chunk_state)
