"""One attention problem of a benchmark: its arrays, its area, and a function that solves it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcx.ops.attention import attention, attention_backend
from lcx.ops.types import AttentionSpec, Mask
from lcx.registry import UserError

# Products of a pair of tiles, each of 2 K FLOPs a pair of tokens: q k and p v; q k, do v, and the three gradients.
PRODUCTS = {"forward": 2, "backward": 5}


@dataclasses.dataclass(frozen=True)
class Case:
    """B rows of S tokens.

    Attributes:
      name: what is measured, in a word or two.
      B, S, H, G, K: rows, tokens in each, query heads, key/value heads, head width.
      mask: visibility.
      documents: lengths in every row, the rest being padding; None for rows of one document.
      dtype: of queries, keys and values.
    """

    name: str
    B: int
    S: int
    H: int
    G: int
    K: int
    mask: Mask = Mask()
    documents: tuple[int, ...] | None = None
    dtype: str = "bfloat16"

    @property
    def spec(self) -> AttentionSpec:
        """As `ops.attention` makes it of this case."""
        return AttentionSpec(self.mask, self.K**-0.5, whole=True)

    def pairs(self) -> int:
        """Visible pairs of one head, in all rows."""
        return self.B * visible_pairs(self.mask, self.documents or (self.S,))

    def flops(self, direction: str) -> int:
        """Of "forward" or "backward"; a backward kernel's recomputation of the scores counts."""
        return 2 * PRODUCTS[direction] * self.pairs() * self.K * self.H

    def inputs(self) -> dict[str, jax.Array]:
        """q, k, v and do: normal numbers, the same at every call."""
        shape = lambda heads: (self.B, self.S, heads, self.K)
        shapes = dict(q=shape(self.H), k=shape(self.G), v=shape(self.G), do=shape(self.H))
        keys = jax.random.split(jax.random.key(0), len(shapes))
        return {name: jax.random.normal(key, shapes[name], self.dtype) for name, key in zip(shapes, keys, strict=True)}

    def segments_BS(self) -> np.ndarray | None:
        """int32 document ids, 0 for padding."""
        if self.documents is None:
            return None
        row_S = np.zeros(self.S, np.int32)
        row_S[: sum(self.documents)] = np.repeat(np.arange(1, len(self.documents) + 1), self.documents)
        return np.broadcast_to(row_S, (self.B, self.S))

    def as_rows(self) -> "Case | None":
        """The same problem with every document in a row of its own; None where documents are not of one length."""
        if self.documents is None or len(set(self.documents)) > 1 or sum(self.documents) != self.S:
            return None
        return dataclasses.replace(self, B=self.B * len(self.documents), S=self.documents[0], documents=None)


def visible_pairs(mask: Mask, documents: tuple[int, ...]) -> int:
    """Pairs (query, key) that see each other in one row of documents of these lengths: a sum over distances, exact."""
    total = 0
    for n in documents:
        left = n - 1 if mask.left is None else min(mask.left, n - 1)
        right = n - 1 if mask.right is None else min(mask.right, n - 1)
        # n - d pairs are d apart, on either side.
        total += (left + 1) * n - left * (left + 1) // 2 + right * n - right * (right + 1) // 2
        for j in range(min(mask.sink_tokens, n)):  # key j is seen beyond the window too
            total += max(0, n - 1 - j - left) + (0 if mask.causal else max(0, j - right))
    return total


def solver(case: Case, implementation: str) -> tuple[Callable[[jax.Array, jax.Array, jax.Array], jax.Array], str]:
    """((q, k, v) -> o by this implementation, a remark).

    One that takes no documents computes documents of one length as rows of a batch: the same work. The remark says so.

    Raises:
      UserError: it refuses.
    """

    def solve(problem: Case, q, k, v):
        rows = lambda x: x.reshape(problem.B, problem.S, *x.shape[2:])
        segments = problem.segments_BS()
        options = dict(mask=problem.mask, segments_q_BS=segments, segments_k_BT=segments, implementation=implementation)
        return attention(rows(q), rows(k), rows(v), **options).reshape(q.shape)

    try:
        ask(case, implementation)
    except UserError:
        in_rows = case.as_rows()
        if in_rows is None:
            raise
        ask(in_rows, implementation)
        return lambda q, k, v: solve(in_rows, q, k, v), "documents as rows of a batch"
    return lambda q, k, v: solve(case, q, k, v), ""


def ask(case: Case, implementation: str) -> None:
    """Raises the UserError of an implementation that refuses the case."""
    array = lambda heads: jax.ShapeDtypeStruct((case.B, case.S, heads, case.K), jnp.dtype(case.dtype))
    ids = None if case.documents is None else jax.ShapeDtypeStruct((case.B, case.S), jnp.int32)
    flags = None
    if case.mask.sink_tokens and case.mask.window is not None:
        flags = jax.ShapeDtypeStruct((case.B, case.S), jnp.bool_)
    described = dict(segments_q_BS=ids, segments_k_BT=ids, sink_BT=flags)
    attention_backend(implementation, case.spec, array(case.H), array(case.G), array(case.G), **described)


def pullback(solve: Callable, *arrays: Any) -> Callable[[Any], tuple[Any, ...]]:
    """d(output) -> d(each of the arrays), compiled, with the forward pass behind it: what it keeps is on the device."""
    _, pull = jax.jit(lambda *arrays: jax.vjp(solve, *arrays))(*arrays)
    compiled = jax.jit(lambda pull, cotangent: pull(cotangent))
    return lambda cotangent: compiled(pull, cotangent)
