"""State-space duality (Mamba-2) on the device that is here, beside Mamba-1 of the same width. Targets are for an H200."""

from collections.abc import Callable
from typing import Any

from lcx.benchmarks import scan_far, scan_peers, scan_targets, scans, selective_scan
from lcx.benchmarks.scan_cases import Scan, Ssd

H, K, STATES = 32, 64, (64, 128)
CPU_H = 2
FAR = Ssd(1, scan_far.TOKENS, H, K, STATES[0])
# Times Mamba-1's speed where N is 64; backward over forward.
OVER_MAMBA1, BACKWARD = 2.0, 3.0


def checked(S: int) -> list[Ssd]:
    """Both sizes of states, whole rows and packed ones, both dtypes."""
    kinds = ((64, False, "bfloat16"), (128, True, "bfloat16"), (64, True, "float32"))
    return [Ssd(2, S, 4, K, N, packed, dtype) for N, packed, dtype in kinds]


def timed(S: int, B: int, on_cpu: bool) -> list[Ssd]:
    """A case for each state size."""
    return [Ssd(B, S, CPU_H if on_cpu else H, K, N) for N in STATES]


def mamba1(implementation: str) -> Callable[[Ssd, str, dict[str, Any]], Any]:
    """A peer: the selective scan of as many channels, on arrays of its own."""

    def make(case, direction, inputs):
        scan = Scan(case.B, case.S, case.E, selective_scan.N)
        return scan_peers.ours(implementation)(scan, direction, scan.inputs())

    return make


def judge(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every target for every implementation, by state size."""
    found = []
    for N in STATES:
        mine = [row for row in rows if row["N"] == N]
        for name in scan_targets.implementations(mine):
            if N == 64:
                found += scan_targets.slowest_ratio(mine, name, "mamba1 ", "times Mamba-1's speed, N=64, at worst", OVER_MAMBA1)
            found += scan_targets.backward_over_forward(mine, name, BACKWARD, f", N={N}")
            found += scan_targets.crossovers(mine, name, f", N={N}")
    return found


def run(argv: list[str]) -> int:
    """See `scans.run`."""
    kernels, _ = scans.kernels_here("selective_scan", selective_scan.checked(1)[0])
    peers = {f"mamba1 {name}": mamba1(name) for name in kernels}
    return scans.run(argv, scans.Benchmark("ssd", checked, FAR, timed, peers, judge))
