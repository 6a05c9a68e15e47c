"""What devices send each other, and which of it runs under a kernel: read from the order in which a compiled program runs.

It says what the compiler ordered, not how long anything takes: a transfer that starts before a kernel and is waited for after
it can be hidden; one that is not asynchronous, or has no kernel in between, cannot.
"""

import dataclasses
import re

from lcx.planning.hlo import array_bytes, called, reached

_START = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = .*? ([\w\-]+)-start\(")
_DONE = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) [\w\-]+-done\(%?([\w.\-]+)")
_DEVICES = re.compile(r"num_partitions=(\d+)")
_LISTED = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_IOTA = re.compile(r"replica_groups=\[\d+,(\d+)\]<=")
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
      group: devices that take part, each in a group of this size; of a permute, which each device sends to one other, 2.
    """

    kind: str
    shape: str
    asynchronous: bool
    kernels: int
    times: int
    group: int

    @property
    def sent(self) -> int:
        """Bytes that each device sends each time: the least with which the operation can be done."""
        others, result = self.group - 1, array_bytes(self.shape)
        by_kind = {"collective-permute": 1, "reduce-scatter": others, "all-reduce": 2 * others / self.group}
        return round(result * by_kind.get(self.kind, others / self.group))


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

    everyone = int((_DEVICES.search(text.partition("\n")[0]) or (0, 1))[1])
    found = []
    for computation in computations:
        waiting = {}
        for number, line in enumerate(computation.lines):
            if start := _START.match(line):
                waiting[start[1]] = start[2], number, _group(line, everyone)
            elif (done := _DONE.match(line)) and done[2] in waiting:
                kind, since, group = waiting.pop(done[2])
                if kind in KINDS:
                    between = computation.lines[since + 1 : number]
                    found.append(Transfer(kind, done[1], True, sum(map(has_kernel, between)), computation.times, group))
            elif synchronous := re.search(rf" = (.*?) ({'|'.join(KINDS)})\(", line):
                group = _group(line, everyone)
                found.append(Transfer(synchronous[2], synchronous[1], False, 0, computation.times, group))
    return found


def _group(line: str, everyone: int) -> int:
    """Devices in a group of an operation between devices; all of them where it names none."""
    if "source_target_pairs" in line:
        return 2
    if match := _IOTA.search(line):
        return int(match[1])
    match = _LISTED.search(line)
    return match[1].count(",") + 1 if match else everyone


def bytes_sent(text: str) -> dict[str, int]:
    """Bytes that each device sends while a program runs, by kind of operation; kinds that do not occur are left out.

    Args:
      text: `compiled.as_text()` of a scheduled program.
    """
    total: dict[str, int] = {}
    for transfer in transfers(text):
        total[transfer.kind] = total.get(transfer.kind, 0) + transfer.sent * transfer.times
    return total


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
