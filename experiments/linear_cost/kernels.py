"""What a token takes by length, of the kernels of attention, Mamba and Mamba-2 at one width, as compiled. See README.md.

python experiments/linear_cost/kernels.py            # kernels.json, kernels.png

A TPU v5p needs libtpu, an H100 lcx[cuda]; neither needs the device. A target whose compiler is not installed here keeps what
kernels.json has of it.
"""

import datetime
import importlib.metadata
import json
import os
import pathlib

from lcx.planning import kernel_counts

LENGTHS = [2**n for n in range(9, 21)]
WIDTH = 2048  # 2 tiles of channels; 32 heads of 64; 16 heads of 128
TILE = 512  # tokens of a tile of attention
WAYS = ("forward", "backward")
# By target: what has to be installed, what is counted.
TARGETS = {
    "v5p": (("libtpu",), "instruction bundles"),
    "h100": (("jax-cuda13-plugin", "nvidia-cuda-nvcc", "triton"), "instructions of warps"),
}
LABELS = dict(attention=("attention", "C0"), selective_scan=("Mamba", "C1"), ssd=("Mamba-2", "C2"))
HERE = pathlib.Path(__file__).parent
Costs = dict[str, list[list[float]]]  # operation -> for each length what a token takes, [forward, backward]


def by_length(counts: dict[str, dict]) -> Costs:
    """What a token of the whole width takes."""

    def attention(length: int, pair: list[int]) -> float:
        whole, masked = pair[0], pair[-1]  # taken for the same where only one is known
        return WIDTH // 128 * ((length / TILE - 1) / 2 * whole + masked) / TILE

    units, found = dict(selective_scan=WIDTH // 1024, ssd=WIDTH // 64), {}
    for op, count in counts.items():
        if op == "attention":
            found[op] = [[attention(length, count[way]) for way in WAYS] for length in LENGTHS]
        else:
            found[op] = [[units[op] * count[way] for way in WAYS]] * len(LENGTHS)
    return found


def measured(target: str) -> dict:
    """Conditions, counts by kernel, and what they make of a token by length."""
    packages, what = TARGETS[target]
    versions = {name: importlib.metadata.version(name) for name in ("jax", *packages)}
    conditions = versions | dict(counted=f"{what}, compiled, not run", width=WIDTH, lengths=LENGTHS)
    conditions |= dict(date=datetime.date.today().isoformat())
    counts = {op: kernel_counts.counted(op, target) for op in LABELS}
    return dict(conditions=conditions, units=kernel_counts.COUNTED, counts=counts, per_token=by_length(counts))


def missing(target: str) -> str | None:
    """What a target's kernels cannot be compiled without, if it is not here."""
    for name in TARGETS[target][0]:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return name
    return None


def plot(found: dict[str, dict], path: pathlib.Path) -> None:
    """A row of panels for each target, a panel for each direction, logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, rows = plt.subplots(
        len(found), 2, figsize=(10, 3.8 * len(found)), constrained_layout=True, sharey="row", squeeze=False
    )
    for panels, (target, result) in zip(rows, found.items(), strict=True):
        for which, (axes, way) in enumerate(zip(panels, WAYS, strict=True)):
            for op, costs in result["per_token"].items():
                values = [cost[which] for cost in costs]
                axes.plot(LENGTHS, values, marker="o", markersize=4, label=LABELS[op][0], color=LABELS[op][1])
            axes.set(yscale="log", xlabel="tokens in the sequence", title=f"{target}, {way}")
            axes.set_xscale("log", base=2)
            axes.grid(alpha=0.3)
        panels[0].set_ylabel(f"{TARGETS[target][1]} per token")
        panels[0].legend()
    figure.suptitle(f"The kernels of one layer, width {WIDTH:,}, bf16: compiled, not run", fontsize=11)
    figure.savefig(path, dpi=150)


def table(per_token: Costs) -> str:
    """As Markdown, forward + backward."""
    rows = ["| tokens | " + " | ".join(per_token) + " |", "|---" * (len(per_token) + 1) + "|"]
    sums = lambda costs: " + ".join(f"{cost:,.0f}" for cost in costs)
    rows += [f"| {n:,} | " + " | ".join(sums(costs[i]) for costs in per_token.values()) + " |" for i, n in enumerate(LENGTHS)]
    return "\n".join(rows)


def main() -> None:
    """Compiles, counts, prints and draws."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    path, found = HERE / "kernels.json", {}
    before = json.loads(path.read_text()) if path.exists() else {}
    for target in TARGETS:
        if (name := missing(target)) is None:
            found[target] = measured(target)
        elif target in before:
            found[target] = before[target]
            print(f"{target} needs {name}, which is not installed here; it stays as of {before[target]['conditions']['date']}")
        else:
            print(f"{target} needs {name}, which is not installed here")
    path.write_text(json.dumps(found, indent=1) + "\n")
    plot(found, HERE / "kernels.png")
    for target, result in found.items():
        print(f"\n{target}, {TARGETS[target][1]}, forward + backward\n\n{table(result['per_token'])}")


if __name__ == "__main__":
    main()
