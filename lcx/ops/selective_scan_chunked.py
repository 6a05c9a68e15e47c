"""The selective scan in chunks, in plain `jnp`: linear memory, every platform, its own backward pass.

The forward pass goes from token to token and keeps the state in front of every chunk. The backward pass takes the chunks from
the last to the first: it computes a chunk's decays and states again, then goes through its tokens in reverse with
g = dL/dh. With m = g a h_{t-1}:

    g += C dy;  du = dt (g . B) + D dy;  ddt = u (g . B) + m . A;  dA += m dt;  dB = g . (dt u);  dC = h . dy;  g *= a

Inside, states are B N E: on every platform sums over N and over E are then products with a vector, and E fills the lanes.
Source: Gu and Dao, "Mamba" (2023), section 3.3.2 and appendix D.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lcx.ops.recurrence import EXACT, Affine, pad_marks, pad_tokens
from lcx.ops.selective_scan import Inputs

# Tokens between two states that are kept: 4 N / CHUNK bytes a token and channel, 1 KiB a token at E=2048, N=16.
CHUNK = 128
# A shorter chunk, where that many state entries are its whole history: decays and states then stay in a core's cache. Measured
# at E=128, N=16 on one CPU core: backward 8 us a token at 16 and 32 tokens, 10 us at 64 and 128.
CACHED, SHORTEST = 2**16, 32


def refuse(spec, shapes, dtypes, device_kind):
    """Runs everywhere."""
    return None


def chunk_of(tokens: int, state: int) -> int:
    """Tokens in a chunk, for rows of `tokens` and `state` = B N E entries; equal chunks but for padding behind the last."""
    fits = CACHED // state
    largest = fits if SHORTEST <= fits < CHUNK else CHUNK
    return -(-tokens // -(-tokens // largest))


def _cut(inputs: Inputs) -> tuple[Inputs, int, int]:
    """(inputs whose tokens are a whole number of chunks, their number, tokens in each)."""
    B, S, E = inputs.u_BSE.shape
    C = chunk_of(S, B * E * inputs.A_EN.shape[1])
    n = -(-S // C)
    marked = pad_marks(inputs.marks, (B, S), n * C - S)
    tokens = {name: pad_tokens(getattr(inputs, name), n * C - S) for name in ("u_BSE", "dt_BSE", "B_BSN", "C_BSN", "z_BSE")}
    return inputs._replace(**tokens, marks=marked), n, C


class _Chunk(NamedTuple):
    """One chunk in fp32, tokens first. `before_softplus` is None where no softplus is asked for; the last two without marks."""

    u_CBE: jax.Array
    dt_CBE: jax.Array
    B_CBN: jax.Array
    C_CBN: jax.Array
    z_CBE: jax.Array | None
    before_softplus_CBE: jax.Array | None
    reset_CB: jax.Array | None
    real_CB: jax.Array | None


def _take(x_BSx, i, C):
    """Chunk i of B S ..., tokens first."""
    return jnp.swapaxes(lax.dynamic_slice_in_dim(x_BSx, i * C, C, 1), 0, 1)


def _put(buffer_BSx, x_CBx, i):
    """The buffer with chunk i replaced."""
    x_BCx = jnp.swapaxes(x_CBx, 0, 1).astype(buffer_BSx.dtype)
    return lax.dynamic_update_slice_in_dim(buffer_BSx, x_BCx, i * x_CBx.shape[0], 1)


def _read(inputs: Inputs, i, C, spec) -> _Chunk:
    take = lambda x: None if x is None else _take(x, i, C).astype(jnp.float32)
    dt, before = take(inputs.dt_BSE), None
    if inputs.dt_bias_E is not None:
        dt = dt + inputs.dt_bias_E.astype(jnp.float32)[None, None]
    if spec.dt_softplus:
        before, dt = dt, jax.nn.softplus(dt)
    reset = real = None
    if inputs.marks is not None:
        reset, real = (_take(x, i, C) for x in inputs.marks)
        dt = jnp.where(real[..., None], dt, 0)  # decay 1, input 0: padding passes the state on
    return _Chunk(take(inputs.u_BSE), dt, take(inputs.B_BSN), take(inputs.C_BSN), take(inputs.z_BSE), before, reset, real)


def _only_real(x_CBE, chunk: _Chunk):
    return x_CBE if chunk.real_CB is None else jnp.where(chunk.real_CB[..., None], x_CBE, 0)


def _decay(dt_xE, reset_x, A_NE):
    """exp(dt A) ... N E, 0 where the state is dropped; dt ... E."""
    a = jnp.exp(dt_xE[..., None, :] * A_NE.reshape((1,) * (dt_xE.ndim - 1) + A_NE.shape))
    return a if reset_x is None else jnp.where(reset_x[..., None, None], 0, a)


def _outer(n_BN, e_BE):
    return n_BN[:, :, None] * e_BE[:, None, :]


def _dot_n(h_BNE, n_BN):
    return jnp.einsum("bne,bn->be", h_BNE, n_BN, precision=EXACT)


def _dot_e(h_BNE, e_BE):
    return jnp.einsum("bne,be->bn", h_BNE, e_BE, precision=EXACT)


def _sum_tokens(x_CBE):
    """Over tokens and rows, as a product with ones: on CPU several times as fast as a sum over leading dims."""
    rows = x_CBE.reshape(-1, x_CBE.shape[-1])
    return jnp.matmul(jnp.ones(rows.shape[0], jnp.float32), rows, precision=EXACT)


def _A_NE(inputs: Inputs):
    return inputs.A_EN.astype(jnp.float32).T


def forward(inputs, initial_state_BEN, *, spec):
    """See `lcx.ops.selective_scan`, "Backends". Keeps the state in front of every chunk."""
    S, u = inputs.u_BSE.shape[1], inputs.u_BSE
    inputs, n, C = _cut(inputs)
    A, D = _A_NE(inputs), inputs.D_E.astype(jnp.float32)[None, None]

    def token(h, at):
        dt_BE, w_BE, B_BN, C_BN, reset_B = at
        h = _decay(dt_BE, reset_B, A) * h + _outer(B_BN, w_BE)
        return h, _dot_n(h, C_BN)

    def chunk(i, carry):
        h, starts, y = carry
        starts = lax.dynamic_update_index_in_dim(starts, h, i, 0)
        x = _read(inputs, i, C, spec)
        h, y_CBE = lax.scan(token, h, (x.dt_CBE, x.dt_CBE * x.u_CBE, x.B_CBN, x.C_CBN, x.reset_CB))
        y_CBE = y_CBE + D * x.u_CBE
        y_CBE = y_CBE if x.z_CBE is None else y_CBE * jax.nn.silu(x.z_CBE)
        return h, starts, _put(y, _only_real(y_CBE, x), i)

    h = jnp.swapaxes(initial_state_BEN, 1, 2)
    start = h, jnp.zeros((n, *h.shape), jnp.float32), jnp.zeros((u.shape[0], n * C, u.shape[2]), u.dtype)
    h, starts, y = lax.fori_loop(0, n, chunk, start)
    return y[:, :S], jnp.swapaxes(h, 1, 2), starts


def backward(inputs, residuals, dy_BSE, dfinal_state_BEN, *, spec):
    """See `lcx.ops.selective_scan`, "Backends"."""
    given, S = inputs, inputs.u_BSE.shape[1]
    inputs, n, C = _cut(inputs)
    dy_BSE = pad_tokens(dy_BSE, n * C - S)
    A, D = _A_NE(inputs), inputs.D_E.astype(jnp.float32)[None, None]

    def again(h, at):
        a, w_BE, B_BN, C_BN, dy_BE = at
        after = a * h + _outer(B_BN, w_BE)
        return after, (h, _dot_e(after, dy_BE), None if C_BN is None else _dot_n(after, C_BN))

    def token(carry, at):
        g, dA = carry
        a, before, dt_BE, w_BE, B_BN, C_BN, dy_BE = at
        g = g + _outer(C_BN, dy_BE)
        gB_BE, dB_BN = _dot_n(g, B_BN), _dot_e(g, w_BE)
        g = g * a
        m = g * before
        return (g, dA + m * dt_BE[:, None, :]), (gB_BE, (m * A[None]).sum(1), dB_BN)

    def chunk(k, carry):
        i = n - 1 - k
        g, total, by_token = carry
        x, dy = _read(inputs, i, C, spec), _take(dy_BSE, i, C).astype(jnp.float32)
        dy, gate = _only_real(dy, x), None if x.z_CBE is None else jax.nn.sigmoid(x.z_CBE)
        dout, dy = dy, dy if gate is None else dy * x.z_CBE * gate
        w, a = x.dt_CBE * x.u_CBE, _decay(x.dt_CBE, x.reset_CB, A)
        C_again = None if gate is None else x.C_CBN  # y itself is needed for the gradient of the gate only
        _, (before, dC, y) = lax.scan(again, residuals[i], (a, w, x.B_CBN, C_again, dy))
        # dA is summed over the chunk first: fewer roundings than one long sum has.
        (g, dA), (gB, mA, dB) = lax.scan(
            token, (g, jnp.zeros_like(g)), (a, before, x.dt_CBE, w, x.B_CBN, x.C_CBN, dy), reverse=True
        )
        ddt = _only_real(x.u_CBE * gB + mA, x)
        ddt = ddt * jax.nn.sigmoid(x.before_softplus_CBE) if spec.dt_softplus else ddt
        dz = None if gate is None else dout * (y + D * x.u_CBE) * gate * (1 + x.z_CBE * (1 - gate))
        found = dict(u_BSE=x.dt_CBE * gB + D * dy, dt_BSE=ddt, B_BSN=dB, C_BSN=dC, z_BSE=dz)
        by_token = {name: _put(buffer, found[name], i) for name, buffer in by_token.items()}
        added = dict(A_EN=dA.sum(0), D_E=_sum_tokens(dy * x.u_CBE), dt_bias_E=_sum_tokens(ddt))
        return g, {name: sum_ + added[name] for name, sum_ in total.items()}, by_token

    names = [name for name in ("u_BSE", "dt_BSE", "B_BSN", "C_BSN", "z_BSE") if getattr(inputs, name) is not None]
    by_token = {name: jnp.zeros_like(getattr(inputs, name)) for name in names}
    total = dict(A_EN=jnp.zeros_like(A), D_E=jnp.zeros_like(D[0, 0]))
    if inputs.dt_bias_E is not None:
        total["dt_bias_E"] = jnp.zeros_like(D[0, 0])
    start = jnp.swapaxes(dfinal_state_BEN, 1, 2), total, by_token
    g, total, by_token = lax.fori_loop(0, n, chunk, start)
    total["A_EN"] = total["A_EN"].T
    gradients = {name: x[:, :S] for name, x in by_token.items()}
    gradients |= {name: x.astype(getattr(given, name).dtype) for name, x in total.items()}
    return given._replace(**gradients, marks=None), jnp.swapaxes(g, 1, 2)


def _stretch(inputs, spec, token, reverse, extra=None):
    """The whole stretch as a map: `token(state_BNE, (a_BNE, chunk's leaves..., extra))` applied to each, and the sum of dt."""
    S = inputs.u_BSE.shape[1]
    inputs, n, C = _cut(inputs)
    extra = pad_tokens(extra, n * C - S)
    A = _A_NE(inputs)

    def chunk(k, carry):
        state, elapsed_BE = carry
        i = n - 1 - k if reverse else k
        x = _read(inputs, i, C, spec)
        added = None
        if extra is not None:
            added = _only_real(_take(extra, i, C).astype(jnp.float32), x)
            added = added if x.z_CBE is None else added * jax.nn.silu(x.z_CBE)
        step = lambda state, at: (token(state, _decay(at[0].dt_CBE, at[0].reset_CB, A), *at), None)
        state, _ = lax.scan(step, state, (x, added), reverse=reverse)
        ended = 0.0 if x.reset_CB is None else jnp.where(x.reset_CB.any(0), jnp.inf, 0.0)[:, None]
        return state, elapsed_BE + x.dt_CBE.sum(0) + ended

    B, E, N = inputs.u_BSE.shape[0], *inputs.A_EN.shape
    start = jnp.zeros((B, N, E), jnp.float32), jnp.zeros((B, E), jnp.float32)
    state, elapsed_BE = lax.fori_loop(0, n, chunk, start)
    return Affine(elapsed_BE[..., None], jnp.swapaxes(state, 1, 2))


def summary(inputs, *, spec):
    """See `lcx.ops.selective_scan`, "Backends"."""

    def token(h, a, at, _):
        return a * h + _outer(at.B_CBN, at.dt_CBE * at.u_CBE)

    return _stretch(inputs._replace(z_BSE=None), spec, token, reverse=False)


def reverse_summary(inputs, dy_BSE, *, spec):
    """See `lcx.ops.selective_scan`, "Backends"."""

    def token(g, a, at, dy_BE):
        return a * (g + _outer(at.C_CBN, dy_BE))

    return _stretch(inputs, spec, token, reverse=True, extra=dy_BSE)
