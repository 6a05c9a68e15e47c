"""Compiles the TPU kernels of the selective scan and counts their instruction bundles: python -m tests.tpu_bundles TARGET FOLDER.

Run with `lcx.planning.bundles.environment(FOLDER)`. Prints {"forward": bundles, "backward": ..., "around": ...} of a token and
1,024 channels, bf16, N=16, two tiles of channels a core, with everything that the operation has (softplus, bias, gate, skip,
documents): the sum over a kernel's loops of their bundles times how often they run. "around" is what stands outside of the
forward pass's loops: an upper bound, because most of it is passed over.
"""

import json
import sys

from lcx.planning.bundles import blocks

TARGETS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
# Loops in the order of the code: tokens that one pass takes, and for how much of the tiles of channels it runs.
FIRST, OTHER, LAST, EVERY = 0.5, 0.5, 0.5, 1
LOOPS = {
    "lcx_selective_scan": ((64, FIRST), (64, OTHER), (32, EVERY), (64, EVERY)),
    "lcx_selective_scan_backward": ((64, FIRST), (64, OTHER), (32, EVERY), (8, EVERY), (16, EVERY), (64, LAST)),
}
# A loop over tokens stands in the one over programs. Smaller blocks are what is left of jumps.
INSIDE, SMALLEST = 2, 60


def main() -> None:
    from tests.test_selective_scan_tpu import compile_for

    target, folder = sys.argv[1:]
    compile_for(target, tokens=512, channels=4096 if target == "v5p" else 2048, states=16)
    kernels = {name: blocks(folder, name) for name in LOOPS}
    inside = {
        name: [block.bundles for block in found if block.loops == INSIDE and block.bundles >= SMALLEST]
        for name, found in kernels.items()
    }
    forward, backward = (per_token(inside[name], loops) for name, loops in LOOPS.items())
    whole = sum(block.bundles for block in kernels["lcx_selective_scan"])
    print(json.dumps(dict(forward=forward, backward=backward, around=(whole - sum(inside["lcx_selective_scan"])) / 128)))


def per_token(found: list[int], loops: tuple[tuple[int, float], ...]) -> float:
    """Bundles for a token of one tile.

    Raises:
      ValueError: the compiler made other loops than are known here.
    """
    if len(found) != len(loops):
        raise ValueError(f"loops of {found} bundles, where {len(loops)} are known")
    return sum(bundles * share / tokens for bundles, (tokens, share) in zip(found, loops, strict=True))


if __name__ == "__main__":
    main()
