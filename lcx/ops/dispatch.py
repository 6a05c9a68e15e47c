"""The one dispatcher: which implementation of an operation runs, and a record of why.

An implementation is a module with `refuse(spec, shapes, dtypes, device_kind) -> str | None`, besides what its operation
asks of it. A named implementation is strict: it runs, or the call raises with its reason. "auto" walks `PREFERENCE` for
the platform and takes the first that does not refuse; winner and refusals go into the records that are open.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import jax

from lcx.registry import UserError, load, unknown
from pallas_kernels import KERNELS

PREFERENCE = {
    "cpu": ("chunked",),
    "tpu": ("mosaic_tpu", "chunked"),
    # None of ours has been run on a card. Every line of triton's kernels is interpreted; not of mosaic_gpu's, which is
    # therefore left out, and so is cudnn, whose backward pass does not give the same bits twice. By name they run.
    "gpu": ("triton", "chunked"),
}
GPU_PLATFORMS = ("gpu", "cuda", "rocm")


@dataclasses.dataclass(frozen=True)
class Choice:
    """One decision.

    Attributes:
      requested: the implementation that was asked for, "auto" included.
      winner: the one that runs.
      refused: (implementation, reason) of every one passed over before it.
      device_kind: the device it was decided for.
    """

    requested: str
    winner: str
    refused: tuple[tuple[str, str], ...]
    device_kind: str


@dataclasses.dataclass
class Record:
    """Decisions made while a `recording` was open: op -> choices in the order first made, each once.

    Attributes:
      require: op -> the only implementation that may win.
    """

    require: Mapping[str, str]
    choices: dict[str, list[Choice]] = dataclasses.field(default_factory=dict)

    def winners(self, op: str) -> tuple[str, ...]:
        """The implementations of `op` that ran, each once."""
        return tuple(dict.fromkeys(choice.winner for choice in self.choices.get(op, ())))

    def as_dict(self) -> dict[str, list[dict[str, Any]]]:
        """The record in JSON's types, for run.json."""
        as_dict = lambda choice: dataclasses.asdict(choice) | dict(refused=dict(choice.refused))
        return {op: [as_dict(choice) for choice in choices] for op, choices in self.choices.items()}

    def add(self, op: str, choice: Choice) -> None:
        """Notes a decision.

        Raises:
          UserError: `require` asks for another winner.
        """
        wanted = self.require.get(op, choice.winner)
        if wanted != choice.winner:
            not_tried = f"implementation={choice.requested!r} on {choice.device_kind} does not try it"
            why = dict(choice.refused).get(wanted, not_tried)
            raise UserError(f"require.{op}={wanted!r}, but {choice.winner!r} would run: {wanted}: {why}")
        known = self.choices.setdefault(op, [])
        if choice not in known:
            known.append(choice)


_OPEN: contextvars.ContextVar[tuple[Record, ...]] = contextvars.ContextVar("lcx_dispatch_records", default=())


@contextlib.contextmanager
def recording(require: Mapping[str, str] | None = None) -> Iterator[Record]:
    """Records what is chosen while tracing inside the block; a function that is already compiled chooses nothing again.

    Args:
      require: op -> implementation; any other winner is an error.

    Raises:
      UserError: `require` names an operation or an implementation that does not exist; or, at trace time, another wins.
    """
    for op, name in (require or {}).items():
        if op not in KERNELS:
            raise unknown("require", op, KERNELS)
        if name not in KERNELS[op]:
            raise unknown(f"require.{op}", name, KERNELS[op])
    record = Record(dict(require or {}))
    token = _OPEN.set((*_OPEN.get(), record))
    try:
        yield record
    finally:
        _OPEN.reset(token)


def target() -> tuple[str, str]:
    """(platform, device kind) that is being traced for: the mesh's in force, else the default backend's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        device = jax.devices()[0]
    return "gpu" if device.platform in GPU_PLATFORMS else device.platform, device.device_kind


def choose(op: str, implementation: str, *, spec: Any, shapes: dict[str, tuple[int, ...]], dtypes: dict[str, Any]) -> ModuleType:
    """The module that carries out `op`.

    Args:
      op: a key of `pallas_kernels.KERNELS`.
      implementation: a name from that table, or "auto".
      spec: the operation's static description, passed to `refuse`.
      shapes, dtypes: by argument name, every array argument that was given.

    Raises:
      UserError: the name is not known, the implementation refuses, every one that "auto" tries refuses, or an open
        `recording` requires another winner.
    """
    table = KERNELS[op]
    if implementation != "auto" and implementation not in table:
        raise unknown(f"{op}: implementation", implementation, ("auto", *table))
    platform, device_kind = target()
    order = PREFERENCE.get(platform, PREFERENCE["cpu"]) if implementation == "auto" else (implementation,)
    refused = []
    for name in order:
        if name not in table:
            continue
        module = load(table, name, field=f"{op}: implementation")
        reason = module.refuse(spec, shapes, dtypes, device_kind)
        if reason is None:
            choice = Choice(implementation, name, tuple(refused), device_kind)
            for record in _OPEN.get():
                record.add(op, choice)
            return module
        refused.append((name, reason))
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refused)
    valid = ", ".join(("auto", *table))
    raise UserError(f"{op}: implementation={implementation!r} cannot run on {device_kind}: {reasons} (valid: {valid})")
