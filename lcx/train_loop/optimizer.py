"""optax optimizers by name. Which parameter gets what goes by logical dimensions, never by rank: stacked layers are a batch."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lcx.registry import unknown
from lcx.sharding import ParameterInfo

OPTIMIZERS = ("adamw", "lion", "adafactor", "muon")
SCHEDULES = ("cosine", "wsd", "constant")


@dataclasses.dataclass(frozen=True)
class Config:
    """Optimizer and learning-rate schedule.

    Attributes:
      name: adamw, lion, adafactor or muon (muon for matrices, adamw without decay for the rest).
      learning_rate: peak.
      beta1, beta2: decay of the first and second moment (muon uses beta1 as its momentum).
      eps: of adamw.
      weight_decay: applied to matrices; not to vectors, nor to parameters marked as not decayed.
      clip_norm: largest global gradient norm; 0 for no clipping.
      schedule: cosine, wsd (warm-up, stable, decay) or constant, each after a linear warm-up.
      warmup_steps: steps of the warm-up.
      decay_fraction: share of the run in which wsd decays linearly to the end.
      final_fraction: of the peak, where cosine and wsd end.
    """

    name: str = "adamw"
    learning_rate: float = 3e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    schedule: str = "cosine"
    warmup_steps: int = 100
    decay_fraction: float = 0.2
    final_fraction: float = 0.1


def learning_rate(config: Config, steps: int) -> optax.Schedule:
    """step -> learning rate for a run of `steps` steps."""
    peak, final = config.learning_rate, config.learning_rate * config.final_fraction
    warmup = min(config.warmup_steps, steps)
    rest = max(steps - warmup, 1)
    match config.schedule:
        case "cosine":
            after = optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction)
        case "wsd":
            decay = max(round(rest * config.decay_fraction), 1)
            stages = [optax.constant_schedule(peak), optax.linear_schedule(peak, final, decay)]
            after = optax.join_schedules(stages, [rest - decay])
        case "constant":
            after = optax.constant_schedule(peak)
        case other:
            raise unknown("optimizer.schedule", other, SCHEDULES)
    return optax.join_schedules([optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1)), after], [warmup])


def label(info: ParameterInfo) -> str:
    """matrix, table (has a vocabulary dimension) or vector; the stacked layer dimension does not count.

    What is not decayed (the rates of a state-space model) and the weights of a convolution, one row a channel, are vectors.
    """
    if "V" in info.dims:
        return "table"
    return "matrix" if len(info.layer_dims) >= 2 and info.decay and "W" not in info.dims else "vector"


def decayed(info: ParameterInfo) -> bool:
    """Whether weight decay applies: to matrices, convolutions and tables that are not marked `decay=False`."""
    return info.decay and (label(info) != "vector" or "W" in info.dims)


def muon_dimensions(info: ParameterInfo) -> optax.contrib.MuonDimensionNumbers | None:
    """Which dimensions of a weight are rows and columns of the matrix that muon orthogonalises; None leaves it to adamw.

    D stands on one side and everything else on the other; the layers are a batch.
    """
    if label(info) != "matrix":
        return None
    width = tuple(i for i, dim in enumerate(info.dims) if dim == "D")
    others = tuple(i for i, dim in enumerate(info.dims) if dim not in "DL")
    if not width or not others:
        last = len(info.dims) - 1
        return optax.contrib.MuonDimensionNumbers(reduction_axis=last - 1, output_axis=last)
    return optax.contrib.MuonDimensionNumbers(*((width, others) if width < others else (others, width)))


def over_layers(inner: optax.GradientTransformation, infos: Any) -> optax.GradientTransformation:
    """`inner` applied to each layer of a stacked parameter by itself, so that statistics over a parameter (adafactor's
    factored moments and RMS clipping) are those of the unrolled model."""
    mapped = lambda info, fn: jax.vmap(fn) if info.dims.startswith("L") else fn

    def init(params):
        return jax.tree.map(lambda info, p: mapped(info, inner.init)(p), infos, params)

    def update(grads, states, params):
        pairs = jax.tree.map(lambda info, g, s, p: mapped(info, inner.update)(g, s, p), infos, grads, states, params)
        pick = lambda which: jax.tree.map(lambda info, pair: pair[which], infos, pairs)
        return pick(0), pick(1)

    return optax.GradientTransformation(init, update)


def build(config: Config, steps: int, infos: Any) -> optax.GradientTransformation:
    """The optimizer for parameters with these infos. The step clips, since it reports the norm it measured."""
    rate, decay = learning_rate(config, steps), config.weight_decay
    mask = jax.tree.map(decayed, infos)
    match config.name:
        case "adamw":
            return optax.adamw(rate, config.beta1, config.beta2, config.eps, weight_decay=decay, mask=mask)
        case "lion":
            return optax.lion(rate, config.beta1, config.beta2, weight_decay=decay, mask=mask)
        case "adafactor":
            scale = over_layers(optax.adafactor(learning_rate=None), infos)
            # optax.adafactor without a rate ends in a descent direction already; decay must point the same way.
            return optax.chain(scale, optax.add_decayed_weights(-decay, mask), optax.scale_by_schedule(rate))
        case "muon":
            return optax.contrib.muon(
                rate,
                beta=config.beta1,
                eps=config.eps,
                weight_decay=decay,
                weight_decay_mask=mask,
                adam_b1=config.beta1,
                adam_b2=config.beta2,
                muon_weight_dimension_numbers=jax.tree.map(muon_dimensions, infos),
                consistent_rms=0.2,  # updates as large as adamw's, so one learning rate serves both (arXiv 2502.16982)
            )
        case other:
            raise unknown("optimizer.name", other, OPTIMIZERS)


def clip(grads: Any, norm: jax.Array, limit: float) -> Any:
    """Gradients scaled down to a global norm of at most `limit`; 0 leaves them."""
    if not limit:
        return grads
    factor = jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-12))
    return jax.tree.map(lambda g: g * factor, grads)
