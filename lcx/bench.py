"""python -m lcx.bench attention | selective_scan | ssd | tune [options]

Measures the kernels on the device that is here, beside a ruler, and says on what it did:

    python -m lcx.bench attention           # numerics first, then times; a table, a JSON file, a plot
    python -m lcx.bench selective_scan      # the same of Mamba-1, beside attention of its width and other scans
    python -m lcx.bench ssd                 # the same of Mamba-2
    python -m lcx.bench tune                # tries tile sizes and writes pallas_kernels/tuned/<device>.json
"""

import argparse
import os

from lcx import command, registry
from lcx.benchmarks import BENCHMARKS


def run(argv: list[str]) -> int:
    """Runs one benchmark of the table: 0, or 1 where a kernel's numbers are wrong."""
    description = "Measure kernels; `python -m lcx.bench NAME --help` says what a benchmark takes."
    parser = command.Parser(prog="python -m lcx.bench", description=description, allow_abbrev=False)
    parser.add_argument("benchmark", nargs="?", default="", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    # A CPU is measured as one device, not as the many that a rehearsal shares it among.
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", "1")
    command.prepare_platform()
    return registry.load(BENCHMARKS, args.benchmark, field="benchmark").run(args.rest)


if __name__ == "__main__":
    command.main(run)
