"""Reading compiled HLO text: which operations a program executes, how often, and how deep inside loops."""

import dataclasses
import math
import re
from collections.abc import Iterator

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([\w\-]+)\(")
_CALLED = re.compile(
    r"(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation of a compiled program.

    Attributes:
      kind: HLO opcode, such as dot, all-gather or while.
      shape: of the result, as HLO text.
      line: the whole line.
      loops: how many while loops it stands in.
      times: how often it runs; 1 a turn where the compiler does not know a loop's trip count.
    """

    kind: str
    shape: str
    line: str
    loops: int
    times: int

    @property
    def bytes(self) -> int:
        """Bytes of the result; of all of them where it is a tuple."""
        arrays = re.findall(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]", self.shape)
        return sum(_width(dtype) * math.prod(int(size) for size in sizes.split(",") if size) for dtype, sizes in arrays)


def _width(dtype: str) -> int:
    """Bytes of one element: f32 is 4, pred 1."""
    return 1 if dtype == "pred" else max(int(re.search(r"\d+", dtype)[0]) // 8, 1)


def _computations(text: str) -> tuple[str, dict[str, list[str]]]:
    found, name, entry = {}, None, ""
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            name = head.group(2)
            found[name] = []
            entry = name if head.group(1) else entry
        elif line.startswith("}"):
            name = None
        elif name is not None:
            found[name].append(line)
    return entry, found


def operations(text: str) -> Iterator[Operation]:
    """Every operation that the entry computation reaches, once for each place that calls it.

    Args:
      text: `compiled.as_text()`.
    """
    entry, computations = _computations(text)

    def walk(name: str, loops: int, times: int) -> Iterator[Operation]:
        for line in computations[name]:
            match = _OPERATION.match(line)
            if not match:
                continue
            _, shape, kind = match.groups()
            yield Operation(kind, shape, line.strip(), loops, times)
            trips = _TRIPS.search(line)
            inside = (loops + 1, times * int(trips.group(1)) if trips else times) if kind == "while" else (loops, times)
            for one, several in _CALLED.findall(line):
                for child in (one or several).split(","):
                    yield from walk(child.strip().lstrip("%"), *inside)

    return walk(entry, 0, 1)
