"""What kernels take for a token: instruction bundles of a TPU's core, instructions of a GPU's warps. Compiled, not run.

    python -m lcx.planning.kernel_counts selective_scan v5p        # a table as JSON; any of `COUNTED`; v4, ..., h100

Counted is everything that an operation does inside, in bf16 with packed documents, in these units (`COUNTED`):

- selective_scan: of a token and 1,024 channels, N=16.
- ssd: of a token and head of 64, N=128.
- causal_conv: of a token and 1,024 channels, 4 taps, silu; on TPUs.
- attention: of a pair of tiles of 512 tokens and head of 128. On a GPU only where nothing is hidden: in a loop that may mask,
  the parts that are jumped over cannot be told from the others. What the copying warps do is left out.

A loop's instructions count as often as the loop runs; where it is known here what loops a kernel has, and it has others, that is
an error.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from lcx import command
from lcx.planning import bundles, kernels, sass
from lcx.registry import load, unknown
from pallas_kernels import KERNELS

COUNTED = dict(
    selective_scan="a token and 1,024 channels, N=16",
    ssd="a token and head of 64, N=128",
    causal_conv="a token and 1,024 channels, 4 taps",
    attention="a pair of tiles of 512 tokens and head of 128",
)

# The selective scan on TPUs: loops in the order of the code, by the tokens that one pass takes, and for how much of the tiles of
# channels it runs, where a core has two.
FIRST, OTHER, LAST, EVERY = 0.5, 0.5, 0.5, 1
LOOPS = {
    "lcx_selective_scan": ((64, FIRST), (64, OTHER), (32, EVERY), (64, EVERY)),
    "lcx_selective_scan_backward": ((64, FIRST), (64, OTHER), (32, EVERY), (8, EVERY), (16, EVERY), (64, LAST)),
}
# A loop over tokens stands in the one over programs. Smaller blocks are what is left of jumps.
INSIDE, SMALLEST = 2, 60
# The convolution on TPUs: tokens of a block that are not 1,024, and what is left of jumps.
CONV_TOKENS, SMALLEST_CONV = {"v4": 512}, 50


def compile_here(op: str, target: str, runs: int = 1) -> None:
    """Compiles both passes, so large that a TPU's core has two tiles of channels, or four of heads, and keys come from HBM."""
    cores = 2 if target in ("v4", "v5p") else 1
    if op == "selective_scan":
        size = (2**20, 2048) if target == kernels.GPU else (512, 2048 * cores)
        kernels.compile_selective_scan(target, *size, 16, summaries=target == kernels.GPU)
    elif op == "ssd":
        kernels.compile_ssd(target, *((2**20, 32) if target == kernels.GPU else (2048, 8 * cores)), 64, 1, 128)
    elif op == "causal_conv":
        kernels.compile_causal_conv(target, 2**14, 2048 * cores)
    else:
        kernels.compile_attention(target, 2**17, 2, 1, 128, runs, plain=target == kernels.GPU)


def compile_into(folder: str | os.PathLike, op: str, target: str, runs: int = 1) -> None:
    """Compiles for a TPU, for `lcx.planning.bundles` to read; in a process of its own, as that wants.

    Raises:
      RuntimeError: it fails.
    """
    command = [sys.executable, "-m", "lcx.planning.kernel_counts", op, target, str(runs)]
    environment = bundles.environment(pathlib.Path(folder).resolve()) | dict(JAX_PLATFORMS="cpu")
    done = subprocess.run(command, cwd=sass.ROOT, env=environment, capture_output=True, text=True, timeout=500)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")


def counted(op: str, target: str) -> dict[str, Any]:
    """By kernel, what one unit of `COUNTED` takes; of attention a list: nothing hidden; masked, where that is known."""
    counts = GPU_COUNTS if target == kernels.GPU else TPU_COUNTS
    if target == kernels.GPU:
        return counts[op](sass.of_program("lcx.planning.kernel_counts", op, target, "1")[0])
    with tempfile.TemporaryDirectory() as folder:
        compile_into(folder, op, target)
        return counts[op](folder, target)


# Bundles, from a folder.


def tpu_scan(folder: str | os.PathLike) -> dict[str, float]:
    """`around` is what stands outside of the forward pass's loops: an upper bound, because most of it is passed over."""
    found, whole = {}, {}
    for name, known in LOOPS.items():
        blocks = bundles.blocks(folder, name)
        inside = [block.bundles for block in blocks if block.loops == INSIDE and block.bundles >= SMALLEST]
        if len(inside) != len(known):
            raise ValueError(f"{name} has loops of {inside} bundles, where {len(known)} are known")
        found[name] = sum(count * share / tokens for count, (tokens, share) in zip(inside, known, strict=True))
        whole[name] = sum(block.bundles for block in blocks) - sum(inside)
    forward, backward = found.values()
    return dict(forward=forward, backward=backward, around=whole["lcx_selective_scan"] / 128)


def tpu_ssd(folder: str | os.PathLike) -> dict[str, float]:
    """From those of a program's block of four chunks of 128 tokens, and of each chunk's four tiles of two heads."""

    def of(kernel: str, sweeps: int) -> float:
        blocks = bundles.blocks(folder, kernel)
        of_block = sum(block.bundles for block in blocks if block.loops <= 1)
        of_chunk = [block.bundles for block in blocks if block.loops == 2]
        *sweep, _ = (count for count in of_chunk if count > 100)  # the states inside a block, for all chunks but its last
        if len(sweep) != sweeps or max(block.loops for block in blocks) != 2:
            raise ValueError(f"{kernel} has loops of {of_chunk} bundles, where {sweeps + 1} are known")
        return (of_block / 4 + sum(of_chunk) - 0.25 * sum(sweep)) / (128 * 8)

    return dict(forward=of("lcx_ssd", 0), backward=of("lcx_ssd_backward", 1))


def tpu_conv(folder: str | os.PathLike, target: str) -> dict[str, dict[str, float]]:
    """By pass of a token in a part of 128 in which no document starts (`plain`), and in one where one does (`asking`).

    In the loop over programs stand one that writes words down and one over groups of 128 channels, and in that those over parts:
    one forward, two backward. Each has two bodies, for parts that ask for documents and for those that do not.
    """

    def of(kernel: str, loops: int) -> dict[str, float]:
        blocks = bundles.blocks(folder, kernel)
        of_program, of_group, of_part = ([block.bundles for block in blocks if block.loops == n] for n in (1, 2, 3))
        bodies, fills = ([count for count in counts if count > SMALLEST_CONV] for counts in (of_part, of_group))
        if (len(bodies), len(fills)) != (2 * loops, 1) or max(block.loops for block in blocks) != 3:
            raise ValueError(f"{kernel} has loops of {fills} and of {bodies} bundles, where 1 and {2 * loops} are known")
        parts, (fill,) = sum(of_part) - sum(bodies), fills
        tokens = CONV_TOKENS.get(target, 1024)
        around = 8 * parts / 128 + (8 * (sum(of_group) - fill) + sum(of_program)) / tokens
        return dict(plain=8 * sum(bodies[1::2]) / 128 + around, asking=(8 * sum(bodies[::2]) + fill) / 128 + around)

    return dict(forward=of("lcx_causal_conv", 1), backward=of("lcx_causal_conv_backward", 2))


def tpu_attention(folder: str | os.PathLike) -> dict[str, list[bundles.Block]]:
    """Of the loop over tiles: of a pair of tiles with nothing hidden, and of one that is masked."""
    inside = lambda way: [block for block in bundles.blocks(folder, f"lcx_attention_{way}") if block.loops == 2]
    return {way: bundles.longest(inside(way), 2) for way in ("forward", "backward")}


# Instructions of warps, from code by kernel.


def gpu_scan(found: dict[str, list[sass.Code]]) -> dict[str, float]:
    """`stretch`: of a token of a segment that is summed up, of either direction; how many are is for the numbers to decide."""
    cuts = load(KERNELS["selective_scan"], "triton", field="selective_scan").cuts
    (forward,), (backward,) = found["forward"], found["backward"]
    walks, chunk = [code.longest() for code in (forward, *found["stretch"])], backward.longest()
    if any(walk.inside for walk in walks) or [loop.inside for loop in chunk.inside] != [[], []]:
        raise ValueError("the selective scan has other loops than a walk of tokens, or than two through the groups of a chunk")
    # A warp takes 64 channels of N=16, backward 32.
    forward, *stretches = (walk.executed() / cuts.UNROLLED * (1024 // 64) for walk in walks)
    # The states' loop takes two groups a turn (and of the last one but their rows, which is left in here), the reverse loop one.
    states, reverse = (loop.instructions.total() for loop in chunk.inside)
    groups = cuts.CHUNK // cuts.GROUP
    executed = chunk.instructions.total() - states - reverse + groups / 2 * states + groups * reverse
    return dict(forward=forward, backward=executed / cuts.CHUNK * (1024 // 32), stretch=max(stretches))


def gpu_ssd(found: dict[str, list[sass.Code]]) -> dict[str, Any]:
    """Of each kernel those of its loop over chunks (`maps`: over heads; `pairs` has none), by the 4 warps of a program, over the
    tokens of a chunk. `stretch` as above; `parts` are those that `backward` is the sum of."""
    of = {name: max(_repeated(code) for code in codes) * 4 / 64 for name, codes in found.items()}
    forward, stretch = of.pop("forward"), of.pop("stretch")
    return dict(forward=forward, backward=sum(of.values()), stretch=stretch, parts=of)


def gpu_attention(found: dict[str, list[sass.Code]]) -> dict[str, list[float]]:
    """Of the loop over tiles of a computing warpgroup. The pairs of tokens that a turn takes are known from its exponentials: one
    each, and forward those of the two rows of a thread that what was summed before decays by."""

    def of(kernel: str, others: int = 0) -> float:
        (code,) = found[f"lcx_attention_{kernel}"]
        computing = [loop for loop in code.loops if loop.instructions["HGMMA"]]
        pairs = 128 * (computing[0].instructions["MUFU.EX2"] - others) if computing else 0
        if len(computing) != 1 or not pairs or pairs % 64**2:
            raise ValueError(f"{kernel}: not a loop over tiles: {len(computing)} loops of products, of {pairs} pairs")
        return 4 * computing[0].instructions.total() * 512**2 / pairs

    return dict(forward=[of("forward", 2)], backward=[of("dq") + of("dk_dv")])


def _repeated(code: sass.Code) -> int:
    """Instructions of the longest loop without loops in it, or of all the code."""
    counts = [loop.instructions.total() for outermost in code.loops for loop in outermost.innermost()]
    # Those that are there only as what waits for a state in front of a segment are short.
    return max([count for count in counts if count > 200], default=code.instructions.total())


TPU_COUNTS = dict(
    selective_scan=lambda folder, _: tpu_scan(folder),
    ssd=lambda folder, _: tpu_ssd(folder),
    causal_conv=tpu_conv,
    attention=lambda folder, _: {way: [block.bundles for block in found] for way, found in tpu_attention(folder).items()},
)
GPU_COUNTS = dict(selective_scan=gpu_scan, ssd=gpu_ssd, attention=gpu_attention)


def run(argv: list[str]) -> None:
    """Prints what is counted; or, told how many runs, compiles only.

    Raises:
      UserError: arguments that are missing, or that nothing is counted for.
    """
    parser = command.Parser(prog="python -m lcx.planning.kernel_counts", description=__doc__.splitlines()[0])
    parser.add_argument("op", help=", ".join(COUNTED))
    parser.add_argument("target", help=", ".join([*kernels.TPUS, kernels.GPU]))
    parser.add_argument("runs", nargs="?", type=int, help="compile only, attention over so many runs")
    given = parser.parse_args(argv)
    if given.target not in (targets := [*kernels.TPUS, kernels.GPU]):
        raise unknown("target", given.target, targets)
    if given.op not in (ops := GPU_COUNTS if given.target == kernels.GPU else TPU_COUNTS):
        raise unknown(f"{given.target}: op", given.op, ops)
    if given.runs is None:
        print(json.dumps(counted(given.op, given.target)))
    else:
        compile_here(given.op, given.target, given.runs)


if __name__ == "__main__":
    command.main(run)
