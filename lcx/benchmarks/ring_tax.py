"""What cutting attention into the steps of a ring costs, transfers left out: all of one rank's steps run one after another on one
device, against one kernel of the same area."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lcx.benchmarks.timing import Timing, interleaved, reason
from lcx.ops.types import AttentionSpec, Mask, Runs, contiguous
from lcx.parallel.layouts import local_runs
from lcx.parallel.plan import Keys, Plan, Queries, block_backward, block_forward
from pallas_kernels.specs import Heads

PLACES = (4, 8, 16)
QUICK_PLACES = (4,)
TARGET = 0.95
ROUNDS, BUDGET = 15, 10.0
COLUMNS = ("implementation", "direction", "P", "S", "one kernel, ms", "steps, ms", "ratio", "note")
LAYOUT = "zigzag"


def measure(S: int, implementations: tuple[str, ...], *, heads: Heads, quick: bool, amortise: bool) -> list[dict[str, Any]]:
    """Rows of `COLUMNS` for one rank of P that share a causal row of S tokens in zigzag order; all ranks have the same area."""
    rows = []
    for P in QUICK_PLACES if quick else PLACES:
        for name in implementations:
            for direction in ("forward", "backward"):
                row = dict(implementation=name, direction=direction, P=P, S=S, target=TARGET, ratio=None, note="")
                # One that keeps no partial results, or runs out of memory, is in the table with its reason.
                try:
                    run = thunks(direction, Rank(name, S, P, heads))
                    found = interleaved(run, rounds=ROUNDS, budget=BUDGET, amortise=amortise)
                except Exception as error:
                    found = dict.fromkeys(("one", "steps"), reason(error))
                one, steps = found["one"], found["steps"]
                if isinstance(one, Timing) and isinstance(steps, Timing):
                    row |= {"one kernel, ms": 1e3 * one.median, "steps, ms": 1e3 * steps.median}
                    row["ratio"] = one.median / steps.median
                else:
                    row["note"] = one if isinstance(one, str) else steps
                rows.append(row)
    return rows


class Rank:
    """The queries of rank 0 and all keys: in the blocks in which a ring brings them, and in one piece."""

    def __init__(self, implementation: str, S: int, P: int, heads: Heads):
        H, G, K = heads
        spec = AttentionSpec(Mask(), K**-0.5)
        kinds = dict(dtype=jnp.dtype(jnp.bfloat16), implementation=implementation)
        self.plan = Plan(spec, LAYOUT, shards=P, length=S, q_heads=H, kv_heads=G, packed=False, **kinds)
        s = local_runs(LAYOUT, S, P, 0).size
        q, do, *blocks = (
            jax.random.normal(key, (1, s, heads, K), jnp.bfloat16)
            for key, heads in zip(jax.random.split(jax.random.key(0), 2 + 2 * P), (H, H, *(2 * P * (G,))), strict=True)
        )
        self.rows = q, do
        self.blocks = list(zip(blocks[:P], blocks[P:], strict=True))
        # The same area whatever the values are, so the pieces need not be put in order.
        self.whole = [tuple(jnp.concatenate(side, axis=1) for side in zip(*self.blocks, strict=True))]

    def queries(self, q: jax.Array, rank: jax.Array, **rows: jax.Array) -> Queries:
        """Where they stand is traced, as it is in a ring: one kernel serves every rank and step."""
        return Queries(q, local_runs(LAYOUT, self.plan.length, self.plan.shards, rank), None, None, **rows)

    def sequence(self, arrays: list, rank: jax.Array) -> list[tuple[Keys, Runs]]:
        """Blocks of keys as they come by, with their order; of one piece, itself."""
        P, S = self.plan.shards, self.plan.length
        keys = [Keys(k, v, None) for k, v in arrays]
        if len(keys) == 1:
            return [(keys[0], contiguous(S, 0 * rank))]
        return [(block, local_runs(LAYOUT, S, P, (rank - distance) % P)) for distance, block in enumerate(keys)]


def thunks(direction: str, rank: Rank) -> dict[str, Callable[[], Any]]:
    """{"one": one kernel over all keys, "steps": a kernel for each block, merged}."""
    plan, first = rank.plan, jnp.int32(0)

    q, do = rank.rows

    @jax.jit
    def forward(arrays, number, q):
        partial = None
        for keys, order in rank.sequence(arrays, number):
            partial = block_forward(plan, rank.queries(q, number), keys, order, partial)
        return partial

    if direction == "forward":
        return dict(one=lambda: forward(rank.whole, first, q), steps=lambda: forward(rank.blocks, first, q))

    @jax.jit
    def backward(arrays, number, q, do, lse, delta):
        queries = rank.queries(q, number, do_BsHK=do, lse_BHs=lse, delta_BHs=delta)
        dq, dkv = 0.0, []
        for keys, order in rank.sequence(arrays, number):
            dq_block, dkv_block = block_backward(plan, queries, keys, order)
            dq = dq + dq_block
            dkv.append(dkv_block)
        return dq, dkv

    o, lse = forward(rank.whole, first, q)
    delta = jnp.einsum("bshk,bshk->bhs", do.astype(jnp.float32), o)
    rows = first, q, do, lse, delta
    return dict(one=lambda: backward(rank.whole, *rows), steps=lambda: backward(rank.blocks, *rows))
