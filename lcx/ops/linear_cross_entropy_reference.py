"""The loss by its definition, with all logits at once. The oracle for every other implementation, and nothing else."""

import jax
import jax.numpy as jnp

LOGITS_LIMIT = 2**28


def refuse(spec, shapes, dtypes, device_kind):
    """Refuses what would not fit, and slices of a vocabulary."""
    B, S, _ = shapes["x"]
    size = B * S * shapes["w"][1]
    if spec.vocabulary.shards > 1:
        return "it needs the whole vocabulary on each device"
    return f"it holds all logits at once and takes at most {LOGITS_LIMIT}, not {size}" if size > LOGITS_LIMIT else None


def losses(x_BSD, w_DV, labels_BS, weights_BS, *, spec):
    """See `lcx.ops.linear_cross_entropy`, "Backends"."""
    logits = jnp.einsum("bsd,dv->bsv", x_BSD, w_DV.astype(x_BSD.dtype), preferred_element_type=jnp.float32)
    if spec.softcap is not None:
        logits = spec.softcap * jnp.tanh(logits / spec.softcap)
    lse = jax.nn.logsumexp(logits, axis=-1)
    counts = weights_BS != 0
    labels = jnp.where(counts, labels_BS, 0)
    nll = lse - jnp.take_along_axis(logits, labels[..., None], axis=-1, mode="fill", fill_value=jnp.nan)[..., 0]
    # jnp counts a negative index from the end
    nll = jnp.where(labels < 0, jnp.nan, nll)
    loss = (1 - spec.label_smoothing) * nll + spec.label_smoothing * (lse - logits.mean(-1)) + spec.z_loss * lse**2
    sum_loss = jnp.where(counts, weights_BS * loss, 0).sum()
    if not spec.per_token:
        return sum_loss, None, None
    return sum_loss, jnp.where(counts, nll, 0), counts & (logits.argmax(-1) == labels)
