"""Sequence mixers: the table, and what a mixer says about itself.

A mixer has `Config`, `caps`, `tiny()`, `check(...)` and is called as `mixer(x_BSD, ctx) -> y_BSD`. One that can serve the
fused token loop of the block (Blockwise Parallel Transformer) also splits into `prepare(x_BSD, ctx) -> memory` and
`attend(weights, x_BCD, memory, chunk) -> y_BCD`, with `attend_weights()` naming the parameters that `attend` uses.
"""

import dataclasses

MIXERS = {
    "full": "lcx.mixers.attention:Full",
    "blockwise": "lcx.mixers.attention:Blockwise",
    "ring": "lcx.mixers.attention:Ring",
    "ulysses": "lcx.mixers.attention:Ulysses",
    "ulysses_ring": "lcx.mixers.attention:UlyssesRing",
    "allgather": "lcx.mixers.attention:AllGather",
}


@dataclasses.dataclass(frozen=True)
class Caps:
    """What a mixer can do; the contract tests check each claim and that everything else raises.

    Attributes:
      causal: a causal form exists.
      bidirectional: a form that sees the future exists.
      packed: documents in one row stay separate.
      sharded: the sequence may be spread over devices.
      layouts: token orders it accepts, the one that balances its work first.
      fused: has `prepare` and `attend`.
      decode: has `init_cache` and `decode`.
    """

    causal: bool = True
    bidirectional: bool = False
    packed: bool = True
    sharded: bool = True
    layouts: tuple[str, ...] = ("contiguous",)
    fused: bool = False
    decode: bool = False
