"""Softmax partials: attention over part of the keys, as (o normalised, logsumexp), and how two of them add up.

A partial is o_BSHK and lse_BHS, both fp32, over some multiset of keys; no key at all is o = 0, lse = -inf. Merging is
associative and commutative, and the result is softmax attention over the union of the keys.
"""

import jax
import jax.numpy as jnp


def _share(lse: jax.Array, total: jax.Array) -> jax.Array:
    """exp(lse - total), where total >= lse; 0 for an empty partial, even where both are -inf. Gradients stay finite."""
    empty = lse == -jnp.inf
    return jnp.where(empty, 0.0, jnp.exp(jnp.where(empty, 0.0, lse) - jnp.where(empty, 0.0, total)))


def _add(lse_1: jax.Array, lse_2: jax.Array) -> jax.Array:
    """log(exp(lse_1) + exp(lse_2)); -inf where both are, with zero gradient there."""
    high = jax.lax.stop_gradient(jnp.maximum(lse_1, lse_2))
    empty = high == -jnp.inf
    high = jnp.where(empty, 0.0, high)
    total = _share(lse_1, high) + _share(lse_2, high)
    return jnp.where(empty, -jnp.inf, high + jnp.log(jnp.where(empty, 1.0, total)))


def _per_row(x_BHS: jax.Array) -> jax.Array:
    """B H S -> B S H 1, to multiply an output."""
    return jnp.swapaxes(x_BHS, 1, 2)[..., None]


def merge(o1_BSHK: jax.Array, lse1_BHS: jax.Array, o2_BSHK: jax.Array, lse2_BHS: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two partials over different keys -> the partial over both; fp32. Differentiable, empty rows included."""
    o1, o2 = o1_BSHK.astype(jnp.float32), o2_BSHK.astype(jnp.float32)
    lse = _add(lse1_BHS, lse2_BHS)
    return o1 * _per_row(_share(lse1_BHS, lse)) + o2 * _per_row(_share(lse2_BHS, lse)), lse


def add_sink(o_BSHK: jax.Array, lse_BHS: jax.Array, sink_logits_H: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Puts one learned logit per head into the denominator: a key whose value is 0, merged once, after all other keys.

    A row without keys keeps o = 0; its lse becomes the sink's. Returns fp32; differentiable in all three arguments.
    Source: Xiao et al. 2023 (StreamingLLM), section 3; gpt-oss.
    """
    sink_1H1 = sink_logits_H.astype(jnp.float32)[None, :, None]
    sink_BHS = jnp.broadcast_to(sink_1H1, lse_BHS.shape)
    lse = _add(lse_BHS, sink_BHS)
    return o_BSHK.astype(jnp.float32) * _per_row(_share(lse_BHS, lse)), lse
