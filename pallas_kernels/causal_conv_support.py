"""What the kernels of the causal convolution share on every device: documents as a word of bits for each token, weights by
distance, and the gradients as they are wanted."""

import jax
import jax.numpy as jnp

# Bit 0: it is a token, not padding. Bit k: of one document with the token k in front, which is then its tap; bit LATER + k: with
# the token k behind, whose tap it is.
LATER = 16
# Tokens of a part.
PART = 128


def reaches(segments_BS: jax.Array, W: int) -> jax.Array:
    """int32 words of a convolution of W taps: (B, parts, tokens of a part), 0 behind the last token.

    What stands in front of a row is of the document of token 0, what stands behind it of every document: nothing comes back from
    there. In parts, because shifts of a whole row take XLA many seconds to compile for a TPU.
    """
    (B, S), more = segments_BS.shape, W - 1
    ids = jnp.pad(segments_BS, ((0, 0), (0, -S % PART))).reshape(B, -1, PART)
    first = jnp.broadcast_to(segments_BS[:, :1, None], (B, 1, more))
    in_front = jnp.concatenate([first, ids[:, :-1, PART - more :]], axis=1)
    behind = jnp.concatenate([ids[:, 1:, :more], jnp.zeros_like(first)], axis=1)
    near = jnp.concatenate([in_front, ids, behind], axis=2)
    token = jnp.arange(ids.shape[1] * PART).reshape(1, -1, PART)
    real = ids != 0
    word = real.astype(jnp.int32)
    for k in range(1, W):
        is_tap = real & (near[:, :, more - k : more - k + PART] == ids)
        has_tap = real & ((near[:, :, more + k : more + k + PART] == ids) | (token >= S - k))
        word |= (is_tap.astype(jnp.int32) << k) | (has_tap.astype(jnp.int32) << (LATER + k))
    return word


def whole(W: int) -> int:
    """The word of a token whose taps are all of its document, and which is a tap of all that could have it."""
    return sum(1 << k for k in range(W)) + sum(1 << (LATER + k) for k in range(1, W))


def by_distance(inputs) -> jax.Array:
    """fp32 rows of E: the weight of the token itself, of the token in front of it, ..., and the bias."""
    w_EW, bias_E = inputs.w_EW.astype(jnp.float32), inputs.bias_E.astype(jnp.float32)
    return jnp.concatenate([jnp.flip(w_EW.T, 0), bias_E[None]])


def gradients(inputs, dx_BSE: jax.Array, of_weights: jax.Array):
    """What a backend's `backward` returns, of_weights being the gradients of `by_distance`."""
    W = inputs.w_EW.shape[1]
    dw_EW, dbias_E = jnp.flip(of_weights[:W], 0).T, of_weights[W]
    found = dict(x_BSE=dx_BSE, w_EW=dw_EW.astype(inputs.w_EW.dtype), bias_E=dbias_E.astype(inputs.bias_E.dtype))
    return inputs._replace(**found, initial_BWE=None, segments_BS=None)
