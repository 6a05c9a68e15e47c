"""What the recurrences share: the algebra of an affine state, and what packed documents mean to a state.

A recurrence s_t = a_t * s_{t-1} + b_t maps the state before a stretch of tokens to the state after it by decay * s + state.
Two neighbouring stretches compose to (a2 a1, a2 b1 + b2): the prefix over chunks and over devices is this composition, and so
is, read from the right, that of the gradients, because d(before) = decay * d(after) + what the stretch itself adds.

A state-space model decays by exp(rate * dt) with a rate that does not depend on the token, so a stretch is described by the
sum of its dt, `elapsed`: one number per channel where the decay has one per state entry. Sources: Blelloch 1990; Gu and Dao,
"Mamba" (2023), section 3.3.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# Of every product of a recurrence: its states are fp32, and by default a TPU would round them to bf16 and a GPU to TF32.
EXACT = lax.Precision.HIGHEST


class Affine(NamedTuple):
    """A stretch of tokens as the map s -> decay(rate, elapsed) * s + state. Both fp32, of one number of dims.

    Attributes:
      elapsed: sum of the dt of the tokens, inf where a document starts among them; size 1 in dims that share it.
      state: what the stretch makes of the state zero.
    """

    elapsed: jax.Array
    state: jax.Array


def decay(rate: jax.Array, elapsed: jax.Array) -> jax.Array:
    """exp(rate * elapsed), and exactly 0 where elapsed is inf, even for a rate that has underflowed to 0."""
    ended = elapsed == jnp.inf
    return jnp.where(ended, 0.0, jnp.exp(rate * jnp.where(ended, 0.0, elapsed)))


def apply(stretch: Affine, state: jax.Array, rate: jax.Array) -> jax.Array:
    """The state after the stretch, given the one before it; for gradients, before it given after it."""
    return decay(rate, stretch.elapsed) * state + stretch.state


def compose(first: Affine, second: Affine, rate: jax.Array) -> Affine:
    """Two neighbouring stretches as one; associative. `first` is passed first: the later tokens, for gradients.

    Args:
      first, second: maps with states of one shape.
      rate: negative; broadcasts against the states, with as many dims.
    """
    return Affine(first.elapsed + second.elapsed, apply(second, first.state, rate))


class Marks(NamedTuple):
    """What document ids mean to a recurrence.

    Attributes:
      reset_BS: bool, the state before this token belongs to another document and is dropped.
      real_BS: bool, False for padding, which passes the state on unchanged, whose output is 0 and which has no gradient.
    """

    reset_BS: jax.Array
    real_BS: jax.Array


def marks(segments_BS: jax.Array | None, previous_B: jax.Array | None = None) -> Marks | None:
    """Where states are dropped. A token resets when its segment is not 0 and not that of the token before it.

    Args:
      segments_BS: int document ids, 0 for padding; None for one document a row.
      previous_B: segment of the token to the left of each row, when the rows are slices of longer ones. None: token 0
        continues what the initial state comes from.
    """
    if segments_BS is None:
        return None
    left_B1 = segments_BS[:, :1] if previous_B is None else previous_B[:, None]
    real_BS = segments_BS != 0
    return Marks(real_BS & (segments_BS != jnp.concatenate([left_B1, segments_BS[:, :-1]], axis=1)), real_BS)


def pad_tokens(x: jax.Array | None, tokens: int) -> jax.Array | None:
    """Zeros (False) behind the tokens of B S ...; None stays None."""
    return x if x is None or tokens == 0 else jnp.pad(x, [(0, 0), (0, tokens)] + [(0, 0)] * (x.ndim - 2))


def pad_marks(marked: Marks | None, shape: tuple[int, int], tokens: int) -> Marks | None:
    """The marks of rows B S with `tokens` of padding behind them, None only when there is nothing to mark."""
    if marked is None and tokens:
        marked = Marks(jnp.zeros(shape, bool), jnp.ones(shape, bool))
    return marked and Marks(*(pad_tokens(x, tokens) for x in marked))


def elapsed(dt_BSx: jax.Array, marked: Marks | None) -> jax.Array:
    """Sum over the tokens of dt B S ..., which is 0 at padding; inf in rows where a document starts."""
    total = dt_BSx.sum(1)
    if marked is None:
        return total
    ended = marked.reset_BS.any(1).reshape((-1,) + (1,) * (total.ndim - 1))
    return jnp.where(ended, jnp.inf, total)


def step_sizes(
    dt_BSx: jax.Array,
    bias_x: jax.Array | None,
    softplus: bool,
    real_BS: jax.Array | None,
    limits: tuple[float, float] | None = None,
) -> jax.Array:
    """fp32 softplus(dt + bias) of B S x, and 0 at padding, whatever stands there: decay 1, input 0, the state is passed on.

    A dt outside `limits` is moved to the nearer one and has no gradient.
    """
    real = (lambda x: x) if real_BS is None else (lambda x: jnp.where(real_BS[..., None], x, 0))
    dt = real(dt_BSx.astype(jnp.float32))
    if bias_x is not None:
        dt = dt + bias_x.astype(jnp.float32)[None, None]
    dt = jax.nn.softplus(dt) if softplus else dt
    if limits is not None:
        low, high = limits
        dt = jnp.where(dt < low, low, jnp.where(dt > high, high, dt))
    return real(dt)
