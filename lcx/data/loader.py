"""Batches on the mesh: every host builds the slices that its own devices hold, and nothing else."""

import json
from typing import Any

import jax
import numpy as np
import xxhash
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lcx.data import build_source
from lcx.data.config import DataConfig
from lcx.data.order import RowOrder
from lcx.data.prepare import prepare_source
from lcx.data.rows import DTYPES, TextRows, empty_slice
from lcx.data.split import SPLITS
from lcx.data.tokenizers import Tokenizer
from lcx.mesh import BATCH_AXES
from lcx.registry import UserError, unknown

BATCH_SPEC = PartitionSpec(BATCH_AXES, "seq")
_NO_ROW = -1


class Loader:
    """An iterator of batches; `make_loader` makes one.

    A batch is a dict of global arrays (batch, sequence_length), sharded (("data", "fsdp"), "seq"), in contiguous order:
      tokens_BS: int32.
      labels_BS: int32, the next token; 0 where the weight is 0 for want of one.
      weights_BS: float32, 1 where the label counts in the loss. 0: padding, the last token of a document, and for tasks with
        `loss_on="answers"` whatever is no answer.
      positions_BS: int32, from 0 in every piece of a document.
      segments_BS: int32, 1, 2, ... for the pieces of a row; 0 for padding.
      answers_BS: bool, tasks only: the label is an answer.
    Order, and therefore every batch, is a function of (seed, step): meshes and process counts do not change it. An epoch
    has every row once; its last batch is filled up with rows of padding.

    Attributes:
      vocab_size: ids are below it.
      tokenizer: for ids shown to people and prompts.
      batches_per_epoch: 0 for the training rows of a task, which never repeat.
      batches: batches delivered since the beginning.
      tokens_seen: tokens delivered since the beginning, over all hosts, padding not counted.
    """

    def __init__(self, rows: Any, order: RowOrder, *, mesh: Mesh, batch: int, sequence_length: int, identity: dict[str, Any]):
        self._rows = rows
        self._order = order
        self._shape = (batch, sequence_length)
        self._sharding = NamedSharding(mesh, BATCH_SPEC)
        self._identity = identity
        self.vocab_size: int = rows.vocab_size
        self.tokenizer: Tokenizer = rows.tokenizer
        self.batches_per_epoch = order.batches_per_epoch
        self.batches = 0
        self.tokens_seen = 0

    @property
    def epoch(self) -> int:
        """Whole epochs delivered; always 0 for the training rows of a task."""
        return self.batches // self.batches_per_epoch if self.batches_per_epoch else 0

    @property
    def fill(self) -> float:
        """Which share of the places of a row holds tokens, over the first rows; the rest is padding, which costs as much."""
        rows = range(min(self._rows.num_rows, 16) or 1)
        return sum(self._rows.row_tokens(row) for row in rows) / len(rows) / self._shape[1]

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> dict[str, jax.Array]:
        rows = next(self._order)
        self.batches += 1
        self.tokens_seen += sum(self._rows.row_tokens(int(row)) for row in rows)
        rows = np.concatenate([rows, np.full(self._shape[0] - len(rows), _NO_ROW)])
        slices = self._build(rows)

        def assemble(name: str) -> jax.Array:
            return jax.make_array_from_callback(self._shape, self._sharding, lambda index: slices[self._bounds(index)][name])

        with jax.transfer_guard_host_to_device("allow"):  # this is where data is meant to go to the devices
            return {f"{name}_BS": assemble(name) for name in DTYPES | self._rows.extra}

    def _bounds(self, index: tuple[slice, ...]) -> tuple[int, int, int, int]:
        (row_low, row_high, _), (low, high, _) = (part.indices(size) for part, size in zip(index, self._shape, strict=True))
        return row_low, row_high, low, high

    def _build(self, rows: np.ndarray) -> dict[tuple[int, int, int, int], dict[str, np.ndarray]]:
        """The slices of this process's devices, each built once however many devices (tensor axis) and arrays share it."""
        indices = self._sharding.addressable_devices_indices_map(self._shape).values()
        wanted = {self._bounds(index) for index in indices}
        parts = {bounds: [] for bounds in wanted}
        # Row by row, because a task draws a row once and keeps it until the next one.
        for at, row in enumerate(rows):
            for bounds in sorted(b for b in wanted if b[0] <= at < b[1]):
                _, _, low, high = bounds
                parts[bounds].append(
                    empty_slice(high - low, self._rows.extra) if row == _NO_ROW else self._rows.slice(int(row), low, high)
                )
        return {bounds: {name: np.stack([p[name] for p in part]) for name in part[0]} for bounds, part in parts.items()}

    def reset(self) -> None:
        """Back to the first batch (a held-out loader is used once per evaluation)."""
        self._order.reset()
        self.batches = self.tokens_seen = 0

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on with the next batch: small, JSON-able, the same on every process."""
        return {
            "order": self._order.state(),
            "batches": self.batches,
            "tokens_seen": self.tokens_seen,
            "identity": self._identity,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on after the last batch before `state()` was taken, on whatever mesh and number of processes.

        Raises:
          UserError: the state belongs to other data, another batch size, sequence length, packing or seed.
        """
        saved = state["identity"]
        for name in sorted(self._identity | saved):
            if self._identity.get(name) != saved.get(name):
                raise UserError(
                    f"the data cannot be resumed: {name} was {json.dumps(saved.get(name))} "
                    f"and is {json.dumps(self._identity.get(name))}; restore that, or start a new run"
                )
        self._order.restore(state["order"])
        self.batches, self.tokens_seen = state["batches"], state["tokens_seen"]


def _same_everywhere(identity: dict[str, Any]) -> None:
    """Raises UserError where the processes of a run are about to read different data: each would train on its own part of it."""
    if jax.process_count() > 1:
        mine = np.frombuffer(xxhash.xxh3_128_digest(json.dumps(identity, sort_keys=True).encode()), np.uint32)
        theirs = multihost_utils.process_allgather(mine)
        if (theirs != theirs[0][None]).any():
            raise UserError(
                f"the processes of this run have different data; process {jax.process_index()} has {json.dumps(identity)}"
            )


def make_loader(
    config: DataConfig,
    source_config: Any = None,
    *,
    split: str,
    mesh: Mesh,
    batch: int,
    sequence_length: int,
    causal_labels: bool = True,
) -> Loader:
    """A loader of the training rows, without end, or of the held-out rows, one epoch in order.

    Every process of the run must call it: process 0 prepares the token store while the others wait.

    Args:
      config: the shared options.
      source_config: a `Config` of the chosen source, None for its defaults.
      split: "train" or "held_out".
      mesh: axes data, fsdp, seq, tensor.
      batch: rows per batch, over all devices.
      sequence_length: columns of a row.
      causal_labels: labels are the next token; else the token itself (objectives that hide tokens do so in the step).

    Raises:
      UserError: batch or sequence length does not fit the mesh, and whatever is wrong with source, store or task.
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    for value, field, axes in ((batch, "batch", BATCH_AXES), (sequence_length, "sequence length", ("seq",))):
        size = int(np.prod([mesh.shape[axis] for axis in axes]))
        if value < 1 or value % size:
            raise UserError(f"{field} {value} must be a positive multiple of mesh {' x '.join(axes)} = {size}")
    part = build_source(config.source, source_config)
    train = split == "train"
    identity = dict(source=config.source, split=split, batch=batch, sequence_length=sequence_length, causal_labels=causal_labels)
    if part.generated:
        rows = part.rows(seed=config.seed, split=split, sequence_length=sequence_length, causal_labels=causal_labels)
    else:
        store = prepare_source(config, part)
        rows = TextRows(store.split(split), config.packing, sequence_length, causal_labels)
        identity |= dict(packing=config.packing, held_out=config.held_out, held_out_fraction=config.held_out_fraction)
    identity |= dict(data=rows.identity, seed=config.seed, shuffle=config.shuffle)
    _same_everywhere(identity)
    order = RowOrder(rows.num_rows, batch, seed=config.seed, shuffle=config.shuffle and train, repeat=train)
    return Loader(rows, order, mesh=mesh, batch=batch, sequence_length=sequence_length, identity=identity)
