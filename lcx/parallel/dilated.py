"""LongNet's dilated attention (Ding et al. 2023, arXiv 2307.02486) over a sequence that is spread over devices.

A branch (w, r) cuts the row into segments of w tokens. Key/value head g and its query heads keep the tokens o, o + r, o + 2r,
... of a segment, o = g mod r, and attend among those. The branches' outputs are mixed by the softmax of their logsumexp, which
is softmax attention over the union of their keys, a key of two branches counted twice. So branches merge as partials do, and
the backward pass of each needs the merged logsumexp only.

Kept tokens are gathered, attended to by an ordinary backend and put back; nothing is computed for the others. A segment within
one shard stays there. One that spans several devices gathers its kept keys from them: w / r keys a head, however long the row.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from lcx.ops.attention import attention_backend
from lcx.ops.types import AttentionSpec, Mask, Segments, contiguous
from lcx.ops.varying import alike
from lcx.parallel.attention import Call, attend, check_arrays
from lcx.registry import UserError


@dataclasses.dataclass(frozen=True)
class Branch:
    """One branch as one device sees it.

    Attributes:
      segment: tokens of a segment, w; of the row where the segment is longer.
      dilation: distance between kept tokens, r.
      devices: how many devices a segment spans.
    """

    segment: int
    dilation: int
    devices: int


@dataclasses.dataclass(frozen=True)
class DilatedPlan:
    """One call of `dilated_attention`, static and hashable.

    Attributes:
      spec: mask, scale, soft-cap.
      branches: the branches.
      shards: devices along the sequence.
      kv_heads: key/value heads of one tensor shard.
      tensor: tensor shards.
      dtype: type in which the output is kept.
      implementation: of the attention backend.
      mixing_gradient: the gradient flows through the mixing weights.
    """

    spec: AttentionSpec
    branches: tuple[Branch, ...]
    shards: int
    kv_heads: int
    tensor: int
    dtype: jnp.dtype
    implementation: str
    mixing_gradient: bool


def plan_branches(segments: tuple[int, ...], dilations: tuple[int, ...], length: int, shards: int) -> tuple[Branch, ...]:
    """The branches of a row of `length` tokens over `shards` devices.

    Raises:
      UserError: not as many dilations as segments, none of 1 (some tokens would see nothing), or segments that do not fit the
        shards.
    """
    if len(segments) != len(dilations) or not segments:
        raise UserError(f"segments={segments} and dilations={dilations} must be as many, and at least one")
    for name, values in (("segments", segments), ("dilations", dilations)):
        if any(not isinstance(value, int) or value < 1 for value in values):
            raise UserError(f"{name}={values} must be whole numbers of at least 1")
    if 1 not in dilations:
        raise UserError(f"dilations={dilations} must hold a 1: no other branch keeps every token of every head")
    s, branches = length // shards, []
    for w, r in zip(segments, dilations, strict=True):
        if r > w:
            raise UserError(f"dilation {r} of segment {w} keeps less than one token of it; use at most {w}")
        w, r = min(w, length), min(r, length)
        if shards == 1 or w <= s:
            if shards > 1 and s % w:
                near = math.gcd(w, s)
                raise UserError(f"segment {w} must divide the {s} tokens of a shard, or be a multiple of them; {near} does")
            branches.append(Branch(w, r, 1))
            continue
        near = s * 2 ** max(0, round(math.log2(w / s)))
        if w % s or shards % (w // s):
            raise UserError(f"segment {w} spans {w / s:g} shards of {s} tokens, which must divide mesh.seq={shards}; {near} does")
        if s % r:
            raise UserError(f"dilation {r} of segment {w} must divide the {s} tokens of a shard; {math.gcd(r, s)} does")
        branches.append(Branch(w, r, w // s))
    return tuple(branches)


def dilated_attention(
    q_BSHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    *,
    mesh: Mesh,
    segments: tuple[int, ...],
    dilations: tuple[int, ...],
    causal: bool = True,
    segments_BS: jax.Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    mixing_gradient: bool = True,
    implementation: str = "auto",
) -> jax.Array:
    """Attention to the tokens that LongNet's branches keep: cost linear in S, the same values and gradients on any mesh.

    The pattern is that of the row: documents in one row do not see each other, and which of their own tokens they see depends
    on where they start.

    Args:
      q_BSHK, k_BTGK, v_BTGK: queries, keys and values of one floating dtype, S = T, tokens in contiguous order.
      mesh: the device mesh; batch over (data, fsdp), tokens over seq, heads over tensor.
      segments, dilations: w and r of every branch. A segment longer than the row is the row.
      causal: no query sees a later key.
      segments_BS: int document ids, 0 for padding; None for rows of one document.
      scale, softcap: as in `lcx.ops.attention.attention`.
      mixing_gradient: False takes the branches' mixing weights as constants, as the paper's code does.
      implementation: of the attention backend on each device.

    Returns:
      o_BSHK in q's dtype.

    Raises:
      UserError: arguments that do not fit together or onto the mesh.
    """
    mask = Mask(causal=causal)
    check_arrays("dilated_attention", q_BSHK, k_BTGK, v_BTGK, mesh, segments_BS)
    (_, S, _, K), G = q_BSHK.shape, k_BTGK.shape[2]
    shards, tensor = mesh.shape["seq"], mesh.shape["tensor"]
    if S % shards:
        raise UserError(f"dilated_attention: S={S} tokens cannot be divided among mesh axis seq={shards}")
    plan = DilatedPlan(
        spec=AttentionSpec(mask, K**-0.5 if scale is None else float(scale), None if softcap is None else float(softcap)),
        branches=plan_branches(segments, dilations, S, shards),
        shards=shards,
        kv_heads=G // tensor,
        tensor=tensor,
        dtype=jnp.dtype(q_BSHK.dtype),
        implementation=implementation,
        mixing_gradient=mixing_gradient,
    )
    tokens_BS = None if segments_BS is None else segments_BS.astype(jnp.int32)
    return attend(Call(forward, backward, plan, mesh), q_BSHK, k_BTGK, v_BTGK, None, tokens_BS)[0]


class Kept:
    """Which tokens the heads of this device keep in a branch: B s G ... <-> (rows) m A ..., a row for each batch row, segment
    and offset.

    Letters of this file: n segments of a shard, m kept tokens of a segment, r the dilation, O = min(r, G) offsets, A key/value
    heads of one offset (head g = a O + p is head a of the rows of offset p), R query heads of a key/value head.
    """

    def __init__(self, plan: DilatedPlan, branch: Branch, length: int):
        self.length, self.heads, self.r = length, plan.kv_heads, branch.dilation
        self.segment = min(branch.segment, length)
        self.count = -(-length // self.segment)
        self.m = -(-self.segment // self.r)
        self.offsets = min(self.r, self.heads)
        self.groups = -(-self.heads // self.offsets)
        first = lax.axis_index("tensor") * plan.kv_heads if plan.tensor > 1 else 0
        offset_O = (first + jnp.arange(self.offsets)) % self.r
        self.kept_rO = jnp.arange(self.r)[:, None] == offset_O[None]

    @property
    def padded(self) -> bool:
        """Whether some rows end in tokens that do not exist."""
        return self.count * self.segment != self.length or self.m * self.r != self.segment

    def _split(self, x: jax.Array) -> jax.Array:
        """B s ... -> B n m r ..., zeros for tokens that do not exist."""
        B, _, *rest = x.shape
        pad = lambda x, dim, amount: jnp.pad(x, [(0, amount if d == dim else 0) for d in range(x.ndim)]) if amount else x
        x = pad(x, 1, self.count * self.segment - self.length).reshape(B, self.count, self.segment, *rest)
        return pad(x, 2, self.m * self.r - self.segment).reshape(B, self.count, self.m, self.r, *rest)

    def _join(self, x: jax.Array) -> jax.Array:
        """The inverse of `_split`."""
        B, n, m, r, *rest = x.shape
        x = x.reshape(B, n, m * r, *rest)[:, :, : self.segment]
        return x.reshape(B, n * self.segment, *rest)[:, : self.length]

    def _mask(self, ndim: int) -> jax.Array:
        """kept_rO against B n m r A O ...."""
        return self.kept_rO.reshape(1, 1, 1, self.r, 1, self.offsets, *[1] * (ndim - 6))

    def _heads(self, x: jax.Array) -> jax.Array:
        """B s G ... -> B n m r A O ...."""
        B, s, G, *rest = x.shape
        if extra := self.groups * self.offsets - G:
            x = jnp.pad(x, [(0, 0), (0, 0), (0, extra), *[(0, 0)] * len(rest)])
        return self._split(x.reshape(B, s, self.groups, self.offsets, *rest))

    def take(self, x: jax.Array) -> jax.Array:
        """B s G ... -> (B n O) m A ...."""
        B, _, _, *rest = x.shape
        x = self._heads(x)
        if self.r > 1:
            x = jnp.sum(jnp.where(self._mask(x.ndim), x, 0), axis=3, dtype=x.dtype)
        else:
            x = x[:, :, :, 0]
        return jnp.moveaxis(x, 4, 2).reshape(B * self.count * self.offsets, self.m, self.groups, *rest)

    def put(self, x: jax.Array, others: jax.Array) -> jax.Array:
        """(B n O) m A ... -> B s G ..., with those of `others` (B s G ...) where a head does not keep a token."""
        _, m, A, *rest = x.shape
        x = jnp.moveaxis(x.reshape(-1, self.count, self.offsets, m, A, *rest), 2, 4)[:, :, :, None]
        if self.r > 1:
            x = jnp.where(self._mask(x.ndim), x, self._heads(others))
        x = self._join(x)
        return x.reshape(*x.shape[:2], A * self.offsets, *rest)[:, :, : self.heads]

    def take_tokens(self, tokens_Bs: jax.Array | None, batch: int) -> jax.Array | None:
        """Document ids B s -> (B n O) m; made up where needed to hide tokens that do not exist."""
        if tokens_Bs is None:
            if not self.padded:
                return None
            tokens_Bs = jnp.ones((batch, self.length), jnp.int32)
        x = self._split(tokens_Bs)[..., None]
        x = jnp.sum(jnp.where(self.kept_rO[None, None, None], x, 0), axis=3, dtype=jnp.int32)
        return jnp.moveaxis(x, 3, 2).reshape(-1, self.m)


class Rows:
    """The attention of one branch on one device: its kept tokens, the keys of its segment, and the backend."""

    def __init__(self, plan: DilatedPlan, branch: Branch, q, k, v, tokens):
        B, s, H, K = q.shape
        self.kept, self.devices, self.shards = Kept(plan, branch, s), branch.devices, plan.shards
        self._shape = (B, s, plan.kv_heads, H // plan.kv_heads)
        self.q = self.take_q(q)
        tokens_q = self.kept.take_tokens(tokens, B)
        self.k, self.v, tokens_k = (self._gather(x) for x in (self.kept.take(k), self.kept.take(v), tokens_q))
        m, rank = self.kept.m, 0
        if self.devices > 1:
            rank = lax.axis_index("seq") % self.devices
        self.backend = attention_backend(
            plan.implementation, plan.spec, self.q, self.k, self.v, segments_q_BS=tokens_q, segments_k_BT=tokens_k
        )
        self.options = dict(
            spec=plan.spec,
            order_q=contiguous(m, rank * m),
            order_k=contiguous(m * self.devices),
            segments=Segments(tokens_q, tokens_k),
        )

    def take_q(self, x_BsH: jax.Array) -> jax.Array:
        """B s H ... -> (rows) m (A R) ...: the R query heads of a key/value head stay together."""
        rows = self.kept.take(x_BsH.reshape(*self._shape, *x_BsH.shape[3:]))
        return rows.reshape(*rows.shape[:2], -1, *x_BsH.shape[3:])

    def put_q(self, x: jax.Array, others: jax.Array) -> jax.Array:
        """The inverse of `take_q`; `others` as in `Kept.put`."""
        rest = x.shape[3:]
        x = self.kept.put(x.reshape(*x.shape[:2], self.kept.groups, -1, *rest), others.reshape(*self._shape, *rest))
        return x.reshape(*x.shape[:2], -1, *rest)

    def take_lse(self, x_BHs: jax.Array) -> jax.Array:
        """B H s -> (rows) (A R) m."""
        return jnp.swapaxes(self.take_q(jnp.swapaxes(x_BHs, 1, 2)), 1, 2)

    def put_lse(self, x: jax.Array, others_BHs: jax.Array) -> jax.Array:
        """The inverse of `take_lse`."""
        return jnp.swapaxes(self.put_q(jnp.swapaxes(x, 1, 2), jnp.swapaxes(others_BHs, 1, 2)), 1, 2)

    def _groups(self) -> list[list[int]]:
        return [list(range(i, i + self.devices)) for i in range(0, self.shards, self.devices)]

    def _gather(self, x: jax.Array | None) -> jax.Array | None:
        """Kept keys of this device -> those of all devices of the segment."""
        if self.devices == 1 or x is None:
            return x
        return lax.all_gather(x, "seq", axis=1, tiled=True, axis_index_groups=self._groups())

    def _scatter(self, x: jax.Array) -> jax.Array:
        """Gradients for the keys of the segment -> their sum over the devices, for the kept keys of this one."""
        if self.devices == 1:
            return x
        return lax.psum_scatter(x, "seq", scatter_dimension=1, tiled=True, axis_index_groups=self._groups())

    def forward(self, carry=None) -> tuple[jax.Array, jax.Array]:
        """(o, lse) of the kept rows, merged with `carry`; fp32."""
        return self.backend.forward(self.q, self.k, self.v, **self.options, carry=carry)

    def backward(self, do, lse, delta, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """`sums`, (dq, dk, dv) of the branches before this one, with its own added to the kept tokens; fp32."""
        dq, dk, dv = self.backend.backward(self.q, self.k, self.v, do, lse, delta, **self.options)
        # Into the sums at once: a gradient in its places, zeros between, is as large as they are, and every branch has three.
        add_k = lambda total, x: self.kept.put(self.kept.take(total) + self._scatter(x), total)
        return self.put_q(self.take_q(sums[0]) + dq, sums[0]), add_k(sums[1], dk), add_k(sums[2], dv)


def forward(plan: DilatedPlan, q, k, v, tokens, slopes_H) -> tuple[jax.Array, jax.Array]:
    """(o_BsHK, lse_BHs) over the union of all branches, fp32."""
    B, s, H, _ = q.shape
    o, lse = alike((jnp.zeros(q.shape, jnp.float32), jnp.full((B, H, s), -jnp.inf, jnp.float32)), q)
    for branch in plan.branches:
        rows = Rows(plan, branch, q, k, v, tokens)
        carry = (rows.take_q(o), rows.take_lse(lse)) if branch is not plan.branches[0] else None
        o_rows, lse_rows = rows.forward(carry)
        o, lse = rows.put_q(o_rows, o), rows.put_lse(lse_rows, lse)
    return o, lse


def backward(plan: DilatedPlan, q, k, v, do, lse, delta, tokens, slopes_H) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dq_BsHK, dk_BtGK, dv_BtGK), fp32.

    With weights p = exp(score - lse) under the merged lse, d(score) = p (do . v - do . o) where o is the merged output. Taking
    the mixing weights as constants puts the branch's own output in its place.
    """
    sums = alike(tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v)), q)
    for branch in plan.branches:
        rows = Rows(plan, branch, q, k, v, tokens)
        do_rows, lse_rows = rows.take_q(do), rows.take_lse(lse)
        if plan.mixing_gradient:
            delta_rows = rows.take_lse(delta)
        else:
            o, _ = rows.forward()
            delta_rows = jnp.einsum("bshk,bshk->bhs", do_rows.astype(jnp.float32), o)
        sums = rows.backward(do_rows, lse_rows, delta_rows, sums)
    return sums
