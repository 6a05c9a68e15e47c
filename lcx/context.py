"""What a layer knows about the tokens it sees, besides their hidden states."""

import dataclasses

import jax
from jax.sharding import Mesh

from lcx.ops.types import Runs
from lcx.parallel import layouts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SequenceContext:
    """Positions and documents of the tokens, the order they stand in, and the mesh they are spread over.

    Attributes:
      positions_BS: int32, restarting at 0 in each document; for position encodings only.
      segments_BS: int32 document ids, 0 for padding; None when every row is one document, whose padding, if any, comes last and
        is seen by no token before it.
      layout: order of the tokens over the `seq` axis: contiguous, zigzag, striped or cyclic.
      mesh: the device mesh.
    """

    positions_BS: jax.Array
    segments_BS: jax.Array | None
    layout: str = dataclasses.field(metadata=dict(static=True))
    mesh: Mesh = dataclasses.field(metadata=dict(static=True))

    def in_layout(self, name: str) -> "SequenceContext":
        """The same tokens in another layout (hidden states are converted by the block, with `parallel.convert`)."""
        if name == self.layout:
            return self
        move = lambda x: None if x is None else layouts.convert(x, self.layout, name, mesh=self.mesh)
        return SequenceContext(move(self.positions_BS), move(self.segments_BS), name, self.mesh)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenChunk:
    """What `attend` knows about one chunk of queries of one device.

    Attributes:
      positions_BC: int32, for position encodings.
      segments_BC: int32 document ids, or None.
      order: where the chunk stands in its row.
    """

    positions_BC: jax.Array
    segments_BC: jax.Array | None
    order: Runs
