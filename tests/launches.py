"""What the launches of a TPU kernel move, from their grids and blocks: no estimate of anyone's is asked."""

import contextlib
import dataclasses
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest

from pallas_kernels.mosaic_tpu import Operand


@dataclasses.dataclass
class Launch:
    """One call of `pallas_kernels.mosaic_tpu.launch`.

    Attributes:
      name: of the kernel.
      grid: programs.
      operands: inputs and outputs that are there.
      declared: bytes, by the launch's own estimate.
    """

    name: str
    grid: tuple[int, ...]
    operands: dict[str, Operand]
    declared: int

    def bytes(self) -> dict[str, int]:
        """By operand. Programs run in order; a block that the program before had is not copied again, and what of a block is
        outside of its array is not copied."""
        return {name: self._bytes(name, operand) for name, operand in self.operands.items()}

    def _bytes(self, name: str, operand: Operand) -> int:
        array, spec = operand.array, operand.spec
        assert spec is not None and spec.index_map is not None, f"{name} is copied by hand: its blocks are not known"
        programs = np.indices(self.grid).reshape(len(self.grid), -1)
        places = np.stack([np.broadcast_to(np.asarray(place), programs.shape[1]) for place in spec.index_map(*programs)])
        copied = np.append(True, (np.diff(places, axis=1) != 0).any(0))
        block = np.array([[1 if size is None else size] for size in spec.block_shape])
        sizes = np.minimum(block, np.array(array.shape)[:, None] - places * block)[:, copied]
        assert (sizes > 0).all(), f"{name}: a block outside of the array"
        return int(sizes.prod(0).sum()) * array.dtype.itemsize


@contextlib.contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> Iterator[list[Launch]]:
    """The launches that a kernel's module makes inside, as they are traced."""
    found, launch = [], module.launch

    def record(kernel, name, *, grid, inputs, outputs, cost, **options):
        operands = {name: operand for name, operand in (inputs | outputs).items() if operand.array is not None}
        found.append(Launch(name, grid, operands, cost.bytes_accessed))
        return launch(kernel, name, grid=grid, inputs=inputs, outputs=outputs, cost=cost, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, "launch", record)
        yield found
