"""Sequence mixers: the table, and what a mixer says about itself.

A mixer has `Config`, `caps`, `tiny()`, `check(...)`, `balanced_layout(config, ...)` and `score_flops(...)`, and is called as
`mixer(x_BSD, ctx) -> y_BSD`. One that can serve the fused token loop of the block (Blockwise Parallel Transformer) also splits
into `prepare(x_BSD, ctx) -> memory` and `attend(weights, x_BCD, memory, chunk) -> y_BCD`, with `attend_weights()` naming the
parameters that `attend` uses.
"""

import dataclasses

from lcx import registry
from pallas_kernels import KERNELS

MIXERS = {
    "full": "lcx.mixers.attention:Full",
    "blockwise": "lcx.mixers.attention:Blockwise",
    "ring": "lcx.mixers.attention:Ring",
    "ulysses": "lcx.mixers.attention:Ulysses",
    "ulysses_ring": "lcx.mixers.attention:UlyssesRing",
    "allgather": "lcx.mixers.attention:AllGather",
    "longnet": "lcx.mixers.longnet:LongNet",
    "mamba": "lcx.mixers.mamba:Mamba",
    "mamba2": "lcx.mixers.mamba2:Mamba2",
}


@dataclasses.dataclass(frozen=True)
class Caps:
    """What a mixer can do beyond what every one does: a causal form, and documents of one row that stay separate.

    The contract tests check each claim and that everything else raises.

    Attributes:
      bidirectional: a form that sees the future exists.
      sharded: the sequence may be spread over devices.
      layouts: token orders it accepts, the one that balances its work first.
      fused: has `prepare` and `attend`.
      positions: has heads of width `model.head_dim`, whose queries and keys take a position encoding.
    """

    bidirectional: bool = False
    sharded: bool = True
    layouts: tuple[str, ...] = ("contiguous",)
    fused: bool = False
    positions: bool = True


def require_layout(caps: Caps, layout: str, shards: int) -> None:
    """Raises UserError for tokens in an order that a mixer does not take, whose numbers would be wrong."""
    if shards > 1 and layout not in caps.layouts:
        raise registry.UserError(f"tokens stand in layout {layout!r} and this mixer takes {', '.join(caps.layouts)}")


def implementation_problems(op: str, name: str, field: str = "implementation") -> list[str]:
    """Whether an operation has no implementation of the name that a field gives."""
    valid = ("auto", *KERNELS[op])
    return [] if name in valid else [str(registry.unknown(field, name, valid))]
