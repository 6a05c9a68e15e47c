"""The loss of a language model: head matmul and cross-entropy in one operation, so that no S x V array exists.

Backends. A backend is a module (`pallas_kernels.KERNELS["linear_cross_entropy"]`) of two functions:

    refuse(spec, shapes, dtypes, device_kind) -> why it cannot run, or None.
    losses(x_BSD, w_DV, labels_BS, weights_BS, *, spec) -> sum_loss, nll_BS, correct_BS, differentiable in x, w and weights;
        the last two None unless spec.per_token.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lcx.ops import dispatch
from lcx.registry import UserError


@dataclasses.dataclass(frozen=True)
class WholeVocabulary:
    """How statistics over the vocabulary are completed when this device holds all of it: they are complete.

    A sequence of devices that hold slices of the vocabulary passes an object of the same methods (hashable), each of which
    combines the devices' values of an array; ops itself names no mesh axis.
    """

    shards: int = 1

    def index(self) -> Any:
        """Which slice of the vocabulary this device holds."""
        return 0

    def max(self, x: jax.Array) -> jax.Array:
        """The largest value among the slices."""
        return x

    def min(self, x: jax.Array) -> jax.Array:
        """The smallest value among the slices."""
        return x

    def sum(self, x: jax.Array) -> jax.Array:
        """The sum over the slices."""
        return x


@dataclasses.dataclass(frozen=True)
class LossSpec:
    """What a backend needs to know statically. See `linear_cross_entropy` for the fields.

    Attributes:
      vocabulary: where the rest of the vocabulary is.
    """

    chunk: int | None = None
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    softcap: float | None = None
    per_token: bool = False
    vocabulary: Any = WholeVocabulary()


def linear_cross_entropy(
    x_BSD: jax.Array,
    w_DV: jax.Array,
    labels_BS: jax.Array,
    weights_BS: jax.Array,
    *,
    chunk: int | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    per_token: bool = False,
    implementation: str = "auto",
    vocabulary: Any = WholeVocabulary(),
) -> tuple[jax.Array, ...]:
    """Weighted sum of the cross-entropy of softcap(x w) against the labels, exact, with fp32 logits and statistics.

    A token's loss, with e = label_smoothing and lse the logsumexp of its logits, is
    (1 - e) * nll + e * (lse - mean logit) + z_loss * lse ** 2, where nll = lse - logit[label].

    Args:
      x_BSD: final hidden states, fp32 or bf16; the product with w is taken in this dtype and accumulated in fp32.
      w_DV: output head.
      labels_BS: int ids of the next tokens.
      weights_BS: weight of each token in the sum. At weight 0 the label is ignored, whatever its value, and so is the
        gradient with respect to the weight.
      chunk: tokens whose logits exist at a time; None is 8192, fewer (down to 1024) where their logits would take over 4 GiB.
      z_loss, label_smoothing: see above. Sources: PaLM (2022), section 5; Szegedy et al. 2016.
      softcap: None, or c for c * tanh(logit / c) (Gemma 2).
      per_token: also return nll_BS and correct_BS.
      implementation: a name from `pallas_kernels.KERNELS["linear_cross_entropy"]`, or "auto".
      vocabulary: how to reach the rest of the vocabulary when w is a slice of it; see `WholeVocabulary`.

    Returns:
      sum_loss, sum_weight: fp32 scalars; the mean is their quotient, taken after adding up devices and micro-batches.
      nll_BS: fp32, differentiable, not weighted, without smoothing and z-loss; 0 where the weight is 0.
      correct_BS: bool, whether the label has the largest logit (the first of equals); False where the weight is 0.
      A label outside the vocabulary with a weight makes the loss NaN: it cannot raise under jit, and must not pass.

    Raises:
      UserError: arguments that do not fit together, or an implementation that cannot run.
    """
    spec = LossSpec(chunk, float(z_loss), float(label_smoothing), softcap, per_token, vocabulary)
    check(x_BSD, w_DV, labels_BS, weights_BS, spec)
    arrays = dict(x=x_BSD, w=w_DV, labels=labels_BS, weights=weights_BS)
    shapes, dtypes = ({name: getattr(x, what) for name, x in arrays.items()} for what in ("shape", "dtype"))
    backend = dispatch.choose("linear_cross_entropy", implementation, spec=spec, shapes=shapes, dtypes=dtypes)
    weights_BS = weights_BS.astype(jnp.float32)
    sum_loss, nll_BS, correct_BS = backend.losses(x_BSD, w_DV, labels_BS.astype(jnp.int32), weights_BS, spec=spec)
    sums = (sum_loss, weights_BS.sum())
    return (*sums, nll_BS, correct_BS) if per_token else sums


def check(x_BSD: Any, w_DV: Any, labels_BS: Any, weights_BS: Any, spec: LossSpec) -> None:
    """Raises a one-line UserError for arguments that do not fit together."""

    def require(holds, message):
        if not holds:
            raise UserError(f"linear_cross_entropy: {message}")

    require(x_BSD.ndim == 3, f"x_BSD has shape {x_BSD.shape}; it needs 3 dims, B, S, D")
    D = x_BSD.shape[2]
    require(w_DV.ndim == 2 and w_DV.shape[0] == D, f"w_DV has shape {w_DV.shape}; with x_BSD {x_BSD.shape} it needs D={D}")
    for name, x in (("x_BSD", x_BSD), ("w_DV", w_DV)):
        require(jnp.issubdtype(x.dtype, jnp.floating), f"{name} has dtype {x.dtype}; it needs a floating one")
    for name, x in (("labels_BS", labels_BS), ("weights_BS", weights_BS)):
        require(x.shape == x_BSD.shape[:2], f"{name} has shape {x.shape}; it needs {x_BSD.shape[:2]}")
    require(jnp.issubdtype(labels_BS.dtype, jnp.integer), f"labels_BS has dtype {labels_BS.dtype}; it needs an integer one")
    require(spec.chunk is None or spec.chunk >= 1, f"chunk={spec.chunk} needs to be at least 1, or None")
    require(spec.z_loss >= 0, f"z_loss={spec.z_loss} needs to be at least 0")
    require(0 <= spec.label_smoothing < 1, f"label_smoothing={spec.label_smoothing} needs to be in [0, 1)")
    require(spec.softcap is None or spec.softcap > 0, f"softcap={spec.softcap} needs to be above 0, or None")
