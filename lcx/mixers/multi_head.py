"""What attention mixers share: projections of grouped queries, keys and values, position encoding, output projection."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lcx.context import SequenceContext
from lcx.dims import Sizes
from lcx.initializers import matrix, vector
from lcx.mixers import require_layout
from lcx.ops.norm import rms_norm
from lcx.sharding import tokenwise


class MultiHead(nnx.Module):
    """Multi-head attention with grouped queries; a subclass says in `_attention` what attends to what.

    Its config has `qk_norm`.
    """

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Config differences for contract tests."""
        return {}

    @classmethod
    def balanced_layout(cls, config: Any, *, packed: bool, tokens: int, shards: int) -> str | None:
        """The layout in which all devices have the same work; None when they have in every one that is accepted.

        Args:
          config: of the mixer.
          packed: a row holds many documents.
          tokens: of a row that one device holds.
          shards: devices along the sequence.
        """
        return None

    def __init__(self, config: Any, sizes: Sizes, posenc: Any, *, rngs: nnx.Rngs):
        D, H, G, K = sizes.D, sizes.H, sizes.G, sizes.K
        self.config, self.sizes, self.posenc = config, sizes, posenc
        self.query_DHK = matrix(rngs, "DHK", (D, H, K), fan_in=D)
        self.key_DGK = matrix(rngs, "DGK", (D, G, K), fan_in=D)
        self.value_DGK = matrix(rngs, "DGK", (D, G, K), fan_in=D)
        self.out_HKD = matrix(rngs, "HKD", (H, K, D), fan_in=H * K, gain=(2 * sizes.L) ** -0.5)
        if config.qk_norm:
            self.query_norm_K, self.key_norm_K = vector("K", (K,), 1.0), vector("K", (K,), 1.0)

    def __call__(self, x_BSD: jax.Array, ctx: SequenceContext) -> jax.Array:
        """y_BSD in x's dtype."""
        require_layout(self.caps, ctx.layout, ctx.mesh.shape["seq"])
        run = lambda fn, w, *tokens: tokenwise(fn, w, *tokens, mesh=ctx.mesh, dtype=x_BSD.dtype)
        q_BSHK = run(self._query, self._query_weights(), x_BSD, ctx.positions_BS)
        k_BTGK, v_BTGK = run(self._key_value, self._key_value_weights(), x_BSD, ctx.positions_BS)
        return run(self._output, {"out_HKD": self.out_HKD}, self._attention(q_BSHK, k_BTGK, v_BTGK, ctx))

    def _attention(self, q_BSHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, ctx: SequenceContext) -> jax.Array:
        """o_BSHK over the mesh."""
        raise NotImplementedError

    def _query_weights(self) -> dict[str, nnx.Param]:
        return {"query_DHK": self.query_DHK} | ({"query_norm_K": self.query_norm_K} if self.config.qk_norm else {})

    def _key_value_weights(self) -> dict[str, nnx.Param]:
        weights = {"key_DGK": self.key_DGK, "value_DGK": self.value_DGK}
        return weights | ({"key_norm_K": self.key_norm_K} if self.config.qk_norm else {})

    def _query(self, w: dict[str, jax.Array], x_BSD: jax.Array, positions_BS: jax.Array) -> jax.Array:
        q_BSHK = jnp.einsum("BSD,DHK->BSHK", x_BSD, w["query_DHK"].astype(x_BSD.dtype))
        if self.config.qk_norm:
            q_BSHK = rms_norm(q_BSHK, w["query_norm_K"], self.sizes.norm_eps)
        return self.posenc.rotate(q_BSHK, positions_BS)

    def _key_value(self, w: dict[str, jax.Array], x_BTD: jax.Array, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        k_BTGK = jnp.einsum("BTD,DGK->BTGK", x_BTD, w["key_DGK"].astype(x_BTD.dtype))
        if self.config.qk_norm:
            k_BTGK = rms_norm(k_BTGK, w["key_norm_K"], self.sizes.norm_eps)
        return self.posenc.rotate(k_BTGK, positions_BT), jnp.einsum("BTD,DGK->BTGK", x_BTD, w["value_DGK"].astype(x_BTD.dtype))

    def _output(self, w: dict[str, jax.Array], o_BSHK: jax.Array) -> jax.Array:
        return jnp.einsum("BSHK,HKD->BSD", o_BSHK, w["out_HKD"].astype(o_BSHK.dtype))


def head_problems(sizes: Sizes, mesh: dict[str, int]) -> list[str]:
    """Heads that do not divide."""
    problems = []
    for field, heads in (("model.heads", sizes.H), ("model.kv_heads", sizes.G)):
        if heads % mesh["tensor"]:
            problems.append(f"{field}={heads} does not divide over mesh.tensor={mesh['tensor']}")
    if sizes.H % sizes.G:
        problems.append(f"model.heads={sizes.H} must be a multiple of model.kv_heads={sizes.G}")
    return problems


def softcap_problems(softcap: float | None) -> list[str]:
    """A soft-cap that caps nothing."""
    return [f"softcap={softcap} must be above 0, or None"] if softcap is not None and softcap <= 0 else []
