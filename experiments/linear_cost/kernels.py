"""Instruction bundles of a token by length, of the TPU kernels of attention, Mamba and Mamba-2 at one width. See README.md.

python experiments/linear_cost/kernels.py            # compiles for v5p, which needs libtpu and no TPU; kernels.json, kernels.png
"""

import datetime
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import tempfile

from lcx.planning.bundles import environment

LENGTHS = [2**n for n in range(9, 21)]
WIDTH = 2048  # 2 tiles of channels; 32 heads of 64; 16 heads of 128
TILE = 512  # tokens of a tile of attention
HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent


def counted() -> dict[str, list]:
    """What `tests/tpu_counts.py` prints, in a process of its own: the compiler reads once where to write."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.tpu_counts", folder]
        options = dict(cwd=ROOT, env=environment(folder) | dict(JAX_PLATFORMS="cpu"), stdout=subprocess.PIPE, text=True)
        return json.loads(subprocess.run(command, check=True, **options).stdout.splitlines()[-1])


def by_length(counts: dict[str, list]) -> dict[str, dict[int, tuple[float, float]]]:
    """mixer -> length -> bundles of a token of the whole width, (forward, backward)."""

    def attention(length: int, pair: list[int]) -> float:
        whole, masked = pair
        return WIDTH // 128 * ((length / TILE - 1) / 2 * whole + masked) / TILE

    return {
        "attention": {n: tuple(attention(n, pair) for pair in counts["attention"]) for n in LENGTHS},
        "mamba": dict.fromkeys(LENGTHS, tuple(WIDTH // 1024 * count for count in counts["selective_scan"])),
        "mamba2": dict.fromkeys(LENGTHS, tuple(WIDTH // 64 * count for count in counts["ssd"])),
    }


def plot(found: dict[str, dict[int, tuple[float, float]]], path: pathlib.Path) -> None:
    """A panel for each direction, logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), constrained_layout=True, sharey=True)
    for which, (axes, title) in enumerate(zip(panels, ("forward", "backward"), strict=True)):
        for mixer, costs in found.items():
            axes.plot(list(costs), [cost[which] for cost in costs.values()], marker="o", markersize=4, label=mixer)
        axes.set(yscale="log", xlabel="tokens in the sequence", title=title)
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("instruction bundles per token")
    panels[0].legend()
    figure.suptitle(f"The kernels of one layer, width {WIDTH:,}, bf16, v5p: compiled, not run", fontsize=11)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Compiles, counts, prints and draws."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    counts = counted()
    found = by_length(counts)
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    result = dict(conditions=versions | dict(target="v5p", width=WIDTH, date=datetime.date.today().isoformat()))
    (HERE / "kernels.json").write_text(json.dumps(result | dict(counts=counts, per_token=found), indent=1) + "\n")
    plot(found, HERE / "kernels.png")
    print("| tokens | " + " | ".join(f"{mixer} {way}" for mixer in found for way in ("forward", "backward")) + " |")
    print("|---" * (2 * len(found) + 1) + "|")
    for n in LENGTHS:
        print(f"| {n:,} | " + " | ".join(f"{count:,.0f}" for costs in found.values() for count in costs[n]) + " |")


if __name__ == "__main__":
    main()
