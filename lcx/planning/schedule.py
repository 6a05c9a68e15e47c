"""Which transfers between devices run under a kernel: read from the order in which a compiled program runs its operations.

It says what the compiler ordered, not how long anything takes: a transfer that starts before a kernel and is waited for after
it can be hidden; one that is not asynchronous, or has no kernel in between, cannot.
"""

import dataclasses
import re

from lcx.planning.hlo import called, reached

_START = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = .*? ([\w\-]+)-start\(")
_DONE = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) [\w\-]+-done\(%?([\w.\-]+)")
KINDS = ("collective-permute", "all-to-all", "all-gather", "reduce-scatter", "all-reduce")
# Custom calls that are kernels of Pallas (TPU, GPU) or Triton.
KERNEL = re.compile(
    r"custom-call\(.*custom_call_target=\"(?:tpu_custom_call|mosaic_gpu|__gpu\$xla\.gpu\.triton|triton_kernel_call)"
)


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One operation between devices.

    Attributes:
      kind: HLO opcode without -start.
      shape: of the result, as HLO text.
      asynchronous: whether the device may go on while it runs.
      kernels: how many operations that run a kernel stand between its start and where it is waited for.
      times: how often it runs; see `lcx.planning.hlo.Operation`.
    """

    kind: str
    shape: str
    asynchronous: bool
    kernels: int
    times: int


def transfers(text: str) -> list[Transfer]:
    """Every transfer of a scheduled program, in the order of the text.

    Args:
      text: `compiled.as_text()` of a program for TPU or GPU.

    Raises:
      ValueError: the program is not scheduled.
    """
    if "is_scheduled=true" not in text.partition("\n")[0]:
        raise ValueError("this is not the text of a compiled program: it has no schedule")
    computations, by_name = reached(text)
    known: dict[str, bool] = {}

    def has_kernel(line: str) -> bool:
        if KERNEL.search(line):
            return True
        for child in called(line):
            if child not in known:
                known[child] = any(has_kernel(inner) for inner in by_name[child])
        return any(known[child] for child in called(line))

    found = []
    for computation in computations:
        waiting = {}
        for number, line in enumerate(computation.lines):
            if start := _START.match(line):
                waiting[start[1]] = start[2], number
            elif (done := _DONE.match(line)) and done[2] in waiting:
                kind, since = waiting.pop(done[2])
                if kind in KINDS:
                    between = computation.lines[since + 1 : number]
                    found.append(Transfer(kind, done[1], True, sum(map(has_kernel, between)), computation.times))
            elif synchronous := re.search(rf" = (.*?) ({'|'.join(KINDS)})\(", line):
                found.append(Transfer(synchronous[2], synchronous[1], False, 0, computation.times))
    return found


def overlapped(text: str, kind: str = "collective-permute") -> float:
    """Share of the transfers of one kind that run under a kernel, by how often they run.

    Raises:
      ValueError: there is none of that kind.
    """
    all_of_it = [transfer for transfer in transfers(text) if transfer.kind == kind]
    total = sum(transfer.times for transfer in all_of_it)
    hidden = sum(transfer.times for transfer in all_of_it if transfer.asynchronous and transfer.kernels)
    if not total:
        raise ValueError(f"the program has no {kind}")
    return hidden / total
