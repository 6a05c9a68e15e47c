"""Reading compiled HLO text: which operations a program executes, how often, how deep inside loops, and their FLOPs."""

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
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_CONSTANT = re.compile(r" = s(?:32|64)\[\]\S* constant\((\d+)\)")
_DOT = re.compile(r" dot\(%?([\w.\-]+),.*lhs_contracting_dims=\{([\d,]*)\}")
# One floating-point operation for each element of the result.
ELEMENTWISE = {
    *("add", "subtract", "multiply", "divide", "maximum", "minimum", "negate", "abs"),
    *("exponential", "exponential-minus-one", "log", "log-plus-one", "logistic", "tanh", "power", "rsqrt", "sqrt"),
}


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation of a compiled program.

    Attributes:
      kind: HLO opcode, such as dot, all-gather or while.
      shape: of the result, as HLO text.
      line: the whole line.
      loops: how many while loops it stands in.
      times: how often it runs; at most, where a loop may end early; 1 a turn where its condition has no constant bound.
      flops: floating-point operations of one time: 2 for each product of a dot, 1 for each element of elementwise arithmetic.
    """

    kind: str
    shape: str
    line: str
    loops: int
    times: int
    flops: int

    @property
    def bytes(self) -> int:
        """Bytes of the result; of all of them where it is a tuple."""
        return array_bytes(self.shape)


def array_bytes(shape: str) -> int:
    """Bytes of a shape as HLO text: of an array, or of all in a tuple."""
    arrays = re.findall(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]", shape)
    return sum(_width(dtype) * math.prod(int(size) for size in sizes.split(",") if size) for dtype, sizes in arrays)


def _width(dtype: str) -> int:
    """Bytes of one element: f32 is 4, pred 1."""
    return 1 if dtype == "pred" else max(int(re.search(r"\d+", dtype)[0]) // 8, 1)


def _elements(shape: str) -> int:
    """Elements of one array."""
    return math.prod(_sizes(shape))


def _sizes(shape: str) -> list[int]:
    return [int(size) for size in re.search(r"\[([\d,]*)\]", shape)[1].split(",") if size]


def _flops(kind: str, shape: str, line: str, shapes: dict[str, str]) -> int:
    if kind == "dot":
        left, contracted = _DOT.search(line).groups()
        depth = math.prod(_sizes(shapes[left])[int(dim)] for dim in contracted.split(",") if dim)
        return 2 * depth * _elements(shape)
    return _elements(shape) if kind in ELEMENTWISE and re.match(r"b?f\d+\[", shape) else 0


def _bound(lines: list[str], computations: dict[str, list[str]]) -> int:
    """Most turns of a loop whose condition compares its counter with a constant, and perhaps other things."""
    called = [inner for line in lines for one, _ in _CALLED.findall(line) if one for inner in computations[one]]
    return max((int(n) for line in [*lines, *called] for n in _CONSTANT.findall(line)), default=1)


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


@dataclasses.dataclass(frozen=True)
class Computation:
    """One computation of a compiled program, at one place that calls it.

    Attributes:
      lines: its operations; in the order in which they run, where the program is scheduled.
      loops: how many while loops it stands in.
      times: how often it runs; see `Operation`.
    """

    lines: list[str]
    loops: int
    times: int


def reached(text: str) -> tuple[list[Computation], dict[str, list[str]]]:
    """Every computation that the entry computation reaches, once for each place that calls it; and all computations by name.

    Args:
      text: `compiled.as_text()`.
    """
    entry, computations = _computations(text)
    found = []

    def walk(name: str, loops: int, times: int) -> None:
        found.append(Computation(computations[name], loops, times))
        for line in computations[name]:
            inside = loops, times
            if " while(" in line:
                trips = _TRIPS.search(line)
                turns = int(trips[1]) if trips else _bound(computations[_CONDITION.search(line)[1]], computations)
                inside = loops + 1, times * turns
            for child in called(line):
                walk(child, *inside)

    walk(entry, 0, 1)
    return found, computations


def called(line: str) -> list[str]:
    """The computations that an operation calls."""
    names = [one or several for one, several in _CALLED.findall(line)]
    return [child.strip().lstrip("%") for several in names for child in several.split(",")]


def operations(text: str) -> Iterator[Operation]:
    """Every operation that the entry computation reaches, once for each place that calls it.

    Args:
      text: `compiled.as_text()`.
    """
    for computation in reached(text)[0]:
        shapes: dict[str, str] = {}
        for line in computation.lines:
            match = _OPERATION.match(line)
            if match:
                result, shape, kind = match.groups()
                shapes[result] = shape
                flops = _flops(kind, shape, line, shapes)
                yield Operation(kind, shape, line.strip(), computation.loops, computation.times, flops)


def executed_flops(text: str) -> int:
    """FLOPs of a whole program, loops included, as `Operation` counts them.

    The compiler's own cost analysis counts the body of a loop once.

    Args:
      text: `compiled.as_text()`.
    """
    return sum(op.times * op.flops for op in operations(text))
