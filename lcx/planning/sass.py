"""Kernels for GPUs as machine code: registers, spills, and the instructions of nested loops. Needs only the CUDA packages."""

import collections
import dataclasses
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parent.parent.parent
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)(\.EX2)?[^`(\n]*(?:`\((\.L_\w+)\))?")


@dataclasses.dataclass
class Loop:
    """A loop: all of its instructions by name, those of the loops inside included, and those loops."""

    first: int
    last: int
    instructions: collections.Counter
    inside: list["Loop"] = dataclasses.field(default_factory=list)

    def executed(self, *turns: float) -> float:
        """Instructions of one turn of it; `turns` of the loops inside it, of those inside them, and so on."""
        size = lambda loop: loop.instructions.total()
        alone = size(self) - sum(size(loop) for loop in self.inside)
        return alone + sum(turns[0] * loop.executed(*turns[1:]) for loop in self.inside)

    def innermost(self) -> list["Loop"]:
        """The loops in it that have none inside, or itself."""
        return [deeper for loop in self.inside for deeper in loop.innermost()] or [self]


@dataclasses.dataclass
class Code:
    """A kernel: registers of a thread, bytes of spill stores, all instructions by name, the outermost loops."""

    registers: int
    spilled: int
    instructions: collections.Counter
    loops: list[Loop]

    def longest(self) -> Loop:
        """The outermost loop with most instructions."""
        return max(self.loops, key=lambda loop: loop.instructions.total())


def of_program(module: str, *arguments: str, timeout: float = 900) -> tuple[dict[str, list[Code]], str]:
    """What becomes of the kernels that a program compiles: of Triton by the names of their functions, without `_kernel`, of
    Pallas by their own; and what it prints.

    In a process of its own, because where kernels are written, and whether Triton compiles at all, is decided on import.

    Args:
      module: run as `python -m module arguments`.

    Raises:
      RuntimeError: it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | dict(JAX_PLATFORMS="cpu", TRITON_INTERPRET="0", XLA_FLAGS="")
        environment |= dict(JAX_TRITON_DUMP_DIR=folder, MOSAIC_GPU_DUMP_TO=folder)
        command = [sys.executable, "-m", module, *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
        found: dict[str, list[Code]] = {}
        for ptx in sorted(pathlib.Path(folder).rglob("*.ptx")):
            found.setdefault(re.sub(r"_(kernel|\d+)$", "", ptx.stem), []).append(assembled(ptx))
        return found, done.stdout


def assembled(ptx: pathlib.Path) -> Code:
    """What the assembler of JAX's CUDA packages makes of a kernel for sm_90a."""
    cubin = ptx.with_suffix(".cubin")
    run = lambda *command: subprocess.run(command, capture_output=True, text=True, check=True)
    said = run(_tool("nvidia", "cu13", "bin", "ptxas"), "-arch=sm_90a", "-v", ptx, "-o", cubin).stderr
    listing = run(_tool("triton", "backends", "nvidia", "bin", "nvdisasm"), "-c", cubin).stdout
    number = lambda pattern: int(re.search(pattern, said)[1])
    instructions = collections.Counter(name for name, _, _ in _INSTRUCTION.findall(listing))
    return Code(number(r"Used (\d+) registers"), number(r"(\d+) bytes spill stores"), instructions, loops(listing))


def loops(listing: str) -> list[Loop]:
    """The outermost loops of a listing: what stands between a label and a branch back to it."""
    labels, names, branches = {}, [], []
    for line in listing.splitlines():
        if "WARPSYNC.COLLECTIVE" in line:  # behind the program: bringing threads together, then a jump to where they parted
            break
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(names)
        elif instruction := _INSTRUCTION.search(line):
            name, power, to = instruction.groups()
            if name == "BRA" and to in labels:
                branches.append((labels[to], len(names)))
            names.append(name + (power or ""))
    last = {}
    for start, end in branches:  # a loop with several branches back is one
        last[start] = max(end, last.get(start, 0))
    outermost, open_ = [], []
    for start, end in sorted(last.items(), key=lambda ends: (ends[0], -ends[1])):
        loop = Loop(start, end, collections.Counter(names[start : end + 1]))
        while open_ and open_[-1].last < end:
            open_.pop()
        (open_[-1].inside if open_ else outermost).append(loop)
        open_.append(loop)
    return outermost


def _tool(package: str, *path: str) -> pathlib.Path:
    return pathlib.Path(importlib.util.find_spec(package).submodule_search_locations[0], *path)
