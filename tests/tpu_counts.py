"""Compiles the TPU kernels of three mixers and counts their instruction bundles: python -m tests.tpu_counts FOLDER.

Run with `lcx.planning.bundles.environment(FOLDER)`. For v5p, bf16, packed documents. Prints as JSON, forward and backward:
selective_scan, of a token and 1,024 channels, N=16; ssd, of a token and head of 64, N=128; attention, of a pair of tiles of 512
tokens and head of 128 of which nothing is hidden, and of one that is masked.
"""

import json
import pathlib
import sys

from lcx.planning.bundles import blocks

TARGET = "v5p"


def main() -> None:
    from tests import test_kernel_bundles, test_selective_scan_tpu, test_ssd_tpu, tpu_bundles

    folder = pathlib.Path(sys.argv[1])
    test_selective_scan_tpu.compile_for(TARGET, tokens=512, channels=4096, states=16)
    test_ssd_tpu.compile_for(TARGET, 2048, 16, 64, 1, 128)
    test_kernel_bundles.compile_kernels("v5p:2x2x1", "1")
    scan = []
    for name, loops in tpu_bundles.LOOPS.items():
        found = [b.bundles for b in blocks(folder, name) if b.loops == tpu_bundles.INSIDE and b.bundles >= tpu_bundles.SMALLEST]
        scan.append(tpu_bundles.per_token(found, loops))
    ssd = [test_ssd_tpu.bundles(folder, name) for name in ("lcx_ssd", "lcx_ssd_backward")]
    attention = [[b.bundles for b in test_kernel_bundles.bodies(folder, name)] for name in ("forward", "backward")]
    print(json.dumps(dict(selective_scan=scan, ssd=ssd, attention=attention)))


if __name__ == "__main__":
    main()
