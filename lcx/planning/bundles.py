"""What the TPU compiler made of a kernel, without a TPU: its instruction bundles, the units they use, and its vector memory.

A core starts one bundle a cycle at most, so bundles are cycles without waits for memory and for other cores: a lower bound, and
the figure that a change of a kernel's arithmetic moves. libtpu writes them where it is told to when it is loaded:

    subprocess.run(command, env=environment(folder))      # a program that compiles for a TPU
    longest(blocks(folder, "my_kernel"), 1)               # of the kernel's longest piece of straight-line code
"""

import dataclasses
import json
import os
import pathlib
import re

# Of all passes of the compiler, what is read here.
PASSES = "final_bundles|final_hlo-static-per-bundle-utilization|vmem_report"

_BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+(LH|LB|LE|PB|PF|CT)?\s*:\s*([> ]*)\s*\{(.*)")
_REPORT = re.compile(r"const DATA =\s*(?=\{)")
_BRANCH = "sbr.rel"


@dataclasses.dataclass(frozen=True)
class Block:
    """A piece of straight-line code: nothing jumps into it or out of it before its end.

    Attributes:
      loops: how many loops it stands in, the one over the grid among them.
      bundles: how many.
      used: how often each unit is used, by the compiler's names: MXU, XLU, VALU, EUP, VLOAD, VSTORE, SALU, ... VLOAD:FILL and
        VSTORE:SPILL are the loads and stores of registers that did not suffice, VLOAD and VSTORE count them too.
      capacity: how often each could be used in one bundle.
    """

    loops: int
    bundles: int
    used: dict[str, int]
    capacity: dict[str, int]

    def share(self, unit: str) -> float:
        """Of the uses of a unit that the bundles have room for."""
        return self.used[unit] / (self.bundles * self.capacity[unit])


def environment(folder: str | os.PathLike) -> dict[str, str]:
    """Environment of a program whose compilations are to be read from `folder`, which exists. libtpu reads it once a process."""
    dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=.*({PASSES}).*"
    return os.environ | dict(LIBTPU_INIT_ARGS=f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {dump}".strip())


def blocks(folder: str | os.PathLike, kernel: str) -> list[Block]:
    """Every block of a kernel, in the order of the code.

    Args:
      folder: what was written under `environment(folder)`.
      kernel: its name, without the number that the compiler adds.

    Raises:
      ValueError: the folder has none or several kernels of that name.
    """
    code = _only(folder, kernel, "final_bundles").read_text()
    units = _only(folder, kernel, "final_hlo-static-per-bundle-utilization").read_text()
    names, capacity, *rows = (line for line in units.splitlines() if line.strip() and not line.startswith("=="))
    names = [name.strip() for name in names.split(",")]
    capacity = dict(zip(names, map(int, capacity.split()), strict=True))
    uses = [[int(n) for n in row.split()] for row in rows]
    found = []
    for loops, start, stop in _straight(code):
        total = map(sum, zip(*uses[start:stop], strict=True))
        found.append(Block(loops, stop - start, dict(zip(names, total, strict=True)), capacity))
    return found


def longest(found: list[Block], count: int) -> list[Block]:
    """The blocks with most bundles, the longest last."""
    return sorted(found, key=lambda block: block.bundles)[-count:]


def vmem_bytes(folder: str | os.PathLike, kernel: str) -> int:
    """Bytes of the chip's vector memory that a kernel takes, blocks that are copied ahead and spilled registers among them.

    Args:
      folder, kernel: as in `blocks`.

    Raises:
      ValueError: the folder has none or several kernels of that name.
    """
    found = []
    for path in pathlib.Path(folder).glob("*vmem_report.html"):
        text = path.read_text()
        start = _REPORT.search(text).end()
        operations = json.JSONDecoder().raw_decode(text, start)[0]["hlo_breakdowns"]
        found += [
            parts["total_size"] for name, parts in operations.items() if re.fullmatch(rf"{re.escape(kernel)}(\.\d+)?", name)
        ]
    if len(found) != 1:
        raise ValueError(f"{folder} has {len(found)} memory reports of kernels named {kernel}")
    return found[0]


def _only(folder: str | os.PathLike, kernel: str, what: str) -> pathlib.Path:
    name = re.compile(rf"\d+-{re.escape(kernel)}(\.\d+)?-\d+-{what}\.txt")
    found = [path for path in pathlib.Path(folder).iterdir() if name.fullmatch(path.name)]
    if len(found) != 1:
        raise ValueError(f"{folder} has {what} of {len(found)} kernels named {kernel}")
    return found[0]


def _straight(code: str) -> list[tuple[int, int, int]]:
    """(loops, first bundle, bundle after the last) of every block; bundles are counted from 0 in the order of the text.

    A branch takes effect some bundles late; those are written as if they stood in no loop, and count with what follows.
    """
    found, start, loops, number = [], 0, 0, 0

    def end() -> None:
        nonlocal start, loops
        if number > start:
            found.append((loops, start, number))
        start, loops = number, 0

    for line in code.splitlines():
        if (bundle := _BUNDLE.match(line)) is None:
            continue
        mark, inside, instructions = bundle.groups()
        depth = inside.count(">")
        if mark or (depth and loops and depth != loops):
            end()
        loops, number = loops or depth, number + 1
        if _BRANCH in instructions:
            end()
    end()
    return found
