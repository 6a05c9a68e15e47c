"""What the kernels of the causal convolution share on every device: documents as a word of bits for each token, weights by
distance, and the gradients as they are wanted."""

import jax
import jax.numpy as jnp

# Bit 0: it is a token, not padding. Bit k: of one document with the token k in front, which is then its tap; bit LATER + k: with
# the token k behind, whose tap it is.
LATER = 16


def reaches(segments_BS: jax.Array, W: int) -> jax.Array:
    """int32 words of a convolution of W taps. What stands in front of a row is of the document of token 0, what stands behind it
    of every document: nothing comes back from there."""
    real_BS, S = segments_BS != 0, segments_BS.shape[1]
    word_BS = real_BS.astype(jnp.int32)
    for k in range(1, W):
        in_front = jnp.concatenate([jnp.repeat(segments_BS[:, :1], k, axis=1), segments_BS], axis=1)[:, :S]
        behind = jnp.concatenate([segments_BS, segments_BS], axis=1)[:, k : k + S]
        same = behind == segments_BS
        same |= (jnp.arange(S) >= S - k)[None]
        word_BS |= ((in_front == segments_BS) & real_BS).astype(jnp.int32) << k
        word_BS |= (same & real_BS).astype(jnp.int32) << (LATER + k)
    return word_BS


def whole(W: int) -> int:
    """The word of a token whose taps are all of its document, and which is a tap of all that could have it."""
    return sum(1 << k for k in range(W)) + sum(1 << (LATER + k) for k in range(1, W))


def by_distance(inputs) -> jax.Array:
    """fp32 rows of E: the weight of the token itself, of the token in front of it, ..., and the bias."""
    return jnp.concatenate([jnp.flip(inputs.w_EW.T, 0), inputs.bias_E[None]]).astype(jnp.float32)


def gradients(inputs, dx_BSE: jax.Array, of_weights: jax.Array):
    """What a backend's `backward` returns, of_weights being the gradients of `by_distance`."""
    W = inputs.w_EW.shape[1]
    dw_EW, dbias_E = jnp.flip(of_weights[:W], 0).T, of_weights[W]
    found = dict(x_BSE=dx_BSE, w_EW=dw_EW.astype(inputs.w_EW.dtype), bias_E=dbias_E.astype(inputs.bias_E.dtype))
    return inputs._replace(**found, initial_BWE=None, segments_BS=None)
