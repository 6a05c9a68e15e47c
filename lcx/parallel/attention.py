"""Softmax attention over a sequence that is spread over devices: one meaning, one custom VJP, any strategy."""

import dataclasses
import functools
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from lcx.mesh import BATCH_AXES
from lcx.ops.attention import attention_backend, computes_whole
from lcx.ops.partials import add_sink
from lcx.ops.types import AttentionSpec, Mask
from lcx.parallel import STRATEGIES, sinks
from lcx.parallel.layouts import check_layout, padded_length, sequence_permutation
from lcx.parallel.passes import head_passes, in_passes
from lcx.parallel.plan import Plan, pack_tokens
from lcx.registry import UserError, load
from lcx.sharding import activation_spec, per_shard

CHECKED = True  # JAX proves what differs between devices. Tests that interpret a kernel do without: Pallas then cannot


def context_attention(
    q_BSHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    *,
    mesh: Mesh,
    axis: str = "seq",
    strategy: str = "ring",
    layout: str = "zigzag",
    mask: Mask,
    segments_BS: jax.Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes_H: jax.Array | None = None,
    sink_logits_H: jax.Array | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
    ulysses_degree: int | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`lcx.ops.attention.attention` of rows that are spread over the mesh: the same values and gradients on any mesh.

    Batch is spread over (data, fsdp), tokens over seq, heads over tensor. Partial results and sums of gradients over devices
    are fp32; keys and values travel in their own dtype and are not repeated for grouped queries. A length that does not
    divide is padded inside, at the cost of a gather.

    Args:
      q_BSHK, k_BTGK, v_BTGK: queries, keys and values of one floating dtype, S = T, tokens in `layout` order (for a length
        that does not divide: `sequence_permutation(layout, S, shards)`).
      mesh: the device mesh.
      axis: the mesh axis of the tokens; only "seq".
      strategy: a name from `lcx.parallel.STRATEGIES`.
      layout: a name from `lcx.parallel.layouts.LAYOUTS`.
      mask: visibility, in terms of order and documents.
      segments_BS: int document ids, 0 for padding, non-decreasing in order; None for rows of one document.
      scale, softcap, alibi_slopes_H, sink_logits_H: as in `lcx.ops.attention.attention`.
      return_lse: also return the logsumexp of each row's scores, differentiable, and o in fp32.
      implementation: of the attention backend on each device.
      ulysses_degree: devices in one group of strategy "ulysses_ring"; None takes the largest that the heads allow.

    Returns:
      o_BSHK in q's dtype; with `return_lse`, (o_BSHK, lse_BHS) in fp32.

    Raises:
      UserError: arguments that do not fit together or onto the mesh; a strategy or implementation that cannot run.
    """
    _check(q_BSHK, k_BTGK, v_BTGK, mesh, axis, layout, mask, segments_BS, alibi_slopes_H, sink_logits_H)
    (_, S, H, K), G = q_BSHK.shape, k_BTGK.shape[2]
    shards, tensor = mesh.shape["seq"], mesh.shape["tensor"]
    length = padded_length(layout, S, shards)
    dtype = jnp.float32 if return_lse or sink_logits_H is not None else q_BSHK.dtype
    plan = Plan(
        spec=AttentionSpec(mask, K**-0.5 if scale is None else float(scale), None if softcap is None else float(softcap)),
        layout=layout,
        shards=shards,
        length=length,
        q_heads=H // tensor,
        kv_heads=G // tensor,
        packed=segments_BS is not None or length != S,
        dtype=jnp.dtype(dtype),
        implementation=implementation,
        ulysses_degree=ulysses_degree,
    )
    module = _strategy(strategy, plan)

    if length != S:
        padding = Padding(layout, S, length, shards)
        segments_BS = jnp.ones(q_BSHK.shape[:2], jnp.int32) if segments_BS is None else segments_BS
        q_BSHK, k_BTGK, v_BTGK, segments_BS = (padding.add(x) for x in (q_BSHK, k_BTGK, v_BTGK, segments_BS))
    tokens_BS = None
    if segments_BS is not None:
        sink_BS = None
        if plan.has_sinks:
            sink_BS = sinks.leading_tokens_BS(segments_BS.astype(jnp.int32), mask.sink_tokens, layout=layout, mesh=mesh)
        tokens_BS = pack_tokens(segments_BS, sink_BS)

    plain = tokens_BS is None and alibi_slopes_H is None and sink_logits_H is None and not plan.has_sinks
    if shards == 1 and plain and not return_lse and computes_whole(implementation):
        return _by_one_kernel(plan, mesh, q_BSHK, k_BTGK, v_BTGK)

    slopes_H = None if alibi_slopes_H is None else jax.lax.stop_gradient(alibi_slopes_H)
    plan = module.settled(plan)
    passes = head_passes(mask, length // shards, plan.q_heads, plan.kv_heads, functools.partial(_fits, module, plan))
    plan = plan.with_heads(plan.q_heads // passes, plan.kv_heads // passes)
    call = Call(module.forward, module.backward, plan, mesh, passes)
    o_BSHK, lse_BHS = attend(call, q_BSHK, k_BTGK, v_BTGK, slopes_H, tokens_BS)
    if length != S:
        o_BSHK, lse_BHS = padding.remove(o_BSHK), padding.remove(lse_BHS, dim=2)
    if sink_logits_H is not None:
        o_BSHK, lse_BHS = add_sink(o_BSHK, lse_BHS, sink_logits_H)
    return (o_BSHK, lse_BHS) if return_lse else o_BSHK.astype(q_BSHK.dtype)


def _by_one_kernel(plan: Plan, mesh: Mesh, q_BSHK, k_BTGK, v_BTGK) -> jax.Array:
    """Rows that are on one device, by a kernel that computes whole attention only, with a backward pass of its own."""
    spec = dataclasses.replace(plan.spec, whole=True)

    def local(q, k, v):
        return attention_backend(plan.implementation, spec, q, k, v).whole(q, k, v, spec=spec)

    specs = tuple(activation_spec(dims) for dims in ("BSHK", "BTGK", "BTGK"))
    return per_shard(local, mesh=mesh, in_specs=specs, out_specs=specs[0])(q_BSHK, k_BTGK, v_BTGK)


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static in `attend`.

    Attributes:
      forward: (plan, q, k, v, tokens, slopes) -> o, lse on one device, in fp32.
      backward: (plan, q, k, v, do, lse, delta, tokens, slopes) -> dq, dk, dv on one device, in fp32.
      plan: what both know statically, about the heads of one pass; has `dtype`.
      mesh: the device mesh.
      passes: over how many parts of the heads.
    """

    forward: Callable
    backward: Callable
    plan: Any
    mesh: Mesh
    passes: int = 1

    def run(self, function: Callable, dims: tuple[str, ...], out_dims: tuple[str, ...], out_dtypes: tuple, *arrays):
        """`forward` or `backward` on every device."""
        specs = tuple(activation_spec(d) for d in dims)
        local = in_passes(functools.partial(function, self.plan), self.passes, dims, out_dims, out_dtypes)
        out_specs = tuple(activation_spec(d) for d in out_dims)
        return per_shard(local, mesh=self.mesh, in_specs=specs, out_specs=out_specs, checked=CHECKED)(*arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(call: Call, q, k, v, slopes_H, tokens_BS):
    """(o_BSHK in the plan's dtype, lse_BHS fp32): the one custom VJP around every kind of attention over a mesh."""
    return _attend_forward(call, q, k, v, slopes_H, tokens_BS)[0]


def _attend_forward(call, q, k, v, slopes_H, tokens_BS):
    dims, dtypes = ("BSHK", "BTGK", "BTGK", "BS", "H"), (call.plan.dtype, jnp.float32)
    o, lse = call.run(call.forward, dims, ("BSHK", "BHS"), dtypes, q, k, v, tokens_BS, slopes_H)
    # Named here, among the residuals, so that a remat policy can save them and the forward ring is not run again.
    o, lse = checkpoint_name(o, "attention_out"), checkpoint_name(lse, "attention_lse")
    return (o, lse), (q, k, v, slopes_H, tokens_BS, o, lse)


def _attend_backward(call, residuals, cotangents):
    q, k, v, slopes_H, tokens_BS, o, lse = residuals
    do, dlse = cotangents
    delta = jnp.einsum("bshk,bshk->bhs", do.astype(jnp.float32), o.astype(jnp.float32)) - dlse
    delta = jnp.where(lse == -jnp.inf, 0.0, delta)
    dims, grads, dtypes = ("BSHK", "BTGK", "BTGK", "BSHK", "BHS", "BHS", "BS", "H"), ("BSHK", "BTGK", "BTGK"), (q.dtype,) * 3
    dq, dk, dv = call.run(call.backward, dims, grads, dtypes, q, k, v, do, lse, delta, tokens_BS, slopes_H)
    none = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), tokens_BS)
    return dq, dk, dv, jax.tree.map(jnp.zeros_like, slopes_H), none


attend.defvjp(_attend_forward, _attend_backward)


@dataclasses.dataclass(frozen=True)
class Padding:
    """A row of `length` tokens in `layout` order <-> the padded row in `layout` order, where padding stands in between."""

    layout: str
    length: int
    padded: int
    shards: int

    def _kept(self) -> np.ndarray:
        """Where in the padded row the tokens stand that are not padding."""
        return np.flatnonzero(sequence_permutation(self.layout, self.padded, self.shards) < self.length)

    def add(self, x: jax.Array) -> jax.Array:
        """B S ... -> B (padded S) ..., with zeros for padding."""
        return jnp.zeros((x.shape[0], self.padded, *x.shape[2:]), x.dtype).at[:, self._kept()].set(x)

    def remove(self, x: jax.Array, dim: int = 1) -> jax.Array:
        """The inverse of `add`."""
        return jnp.take(x, self._kept(), axis=dim)


def _strategy(name: str, plan: Plan) -> ModuleType:
    """The module of a strategy that serves this plan. On one device all are the same, and nothing is sent."""
    module = load(STRATEGIES, name, field="strategy")
    _require(
        plan.ulysses_degree is None or name == "ulysses_ring",
        f"ulysses_degree={plan.ulysses_degree} is for strategy='ulysses_ring', and strategy={name!r}",
    )
    reason = module.refuse(plan)
    if reason is not None:
        without_degree = dataclasses.replace(plan, ulysses_degree=None)
        others = [
            other
            for other in STRATEGIES
            if other != name and load(STRATEGIES, other, field="strategy").refuse(without_degree) is None
        ]
        raise UserError(f"context_attention: strategy={name!r} cannot run: {reason}; strategies that can: {', '.join(others)}")
    return module if plan.shards > 1 else load(STRATEGIES, "ring", field="strategy")


def _fits(module: ModuleType, plan: Plan, passes: int) -> bool:
    """Whether a strategy serves an equal part of the heads, and as well: keys of fewer heads than devices would travel again."""
    part = plan.with_heads(plan.q_heads // passes, plan.kv_heads // passes)
    return module.refuse(part) is None and part.key_copies == plan.key_copies


def _require(holds: bool, message: str, op: str = "context_attention") -> None:
    if not holds:
        raise UserError(f"{op}: {message}")


def _check(q, k, v, mesh, axis, layout, mask, segments_BS, alibi_slopes_H, sink_logits_H):
    """Raises a one-line UserError for arguments that do not fit together or onto the mesh."""
    _require(axis == "seq", f"axis={axis!r}; tokens are spread over the mesh axis 'seq'")
    check_layout(layout)
    check_arrays("context_attention", q, k, v, mesh, segments_BS)
    _require(isinstance(mask, Mask), f"mask={mask!r} needs to be an lcx.ops.Mask")
    for name, x in (("alibi_slopes_H", alibi_slopes_H), ("sink_logits_H", sink_logits_H)):
        if x is not None:
            H = q.shape[2]
            _require(x.shape == (H,), f"{name} has shape {x.shape}; it needs ({H},), one entry per query head")


def check_arrays(op: str, q, k, v, mesh: Mesh, segments_BS) -> None:
    """Raises a one-line UserError, with the operation in front, for arrays that do not fit together or onto the mesh."""
    require = functools.partial(_require, op=op)
    for name, x in (("q_BSHK", q), ("k_BTGK", k), ("v_BTGK", v)):
        require(x.ndim == 4, f"{name} has shape {x.shape}; it needs 4 dims, {', '.join(name[2:])}")
        floating = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype == q.dtype
        require(floating, f"{name} has dtype {x.dtype} and q_BSHK {q.dtype}; they need one floating dtype")
    (B, S, H, K), G = q.shape, k.shape[2]
    require(k.shape == (B, S, G, K), f"k_BTGK has shape {k.shape}; with q_BSHK {q.shape} it needs B={B}, T=S={S}, K={K}")
    require(v.shape == k.shape, f"v_BTGK has shape {v.shape} and k_BTGK {k.shape}; they need the same")
    require(S > 0 and G > 0 and H % G == 0, f"H={H} query heads cannot be divided among G={G} key/value heads, S={S}")
    rows, tensor = math.prod(mesh.shape[a] for a in BATCH_AXES), mesh.shape["tensor"]
    require(B % rows == 0, f"B={B} rows cannot be divided among mesh axes data*fsdp={rows}")
    for name, heads in (("query heads H", H), ("key/value heads G", G)):
        require(heads % tensor == 0, f"{name}={heads} cannot be divided among mesh axis tensor={tensor}")
    if segments_BS is not None:
        is_ids = segments_BS.shape == (B, S) and jnp.issubdtype(segments_BS.dtype, jnp.integer)
        require(is_ids, f"segments_BS is {segments_BS.dtype}{segments_BS.shape}; it needs int{(B, S)}")
