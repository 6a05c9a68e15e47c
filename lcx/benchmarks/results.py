"""Where figures go: the conditions they hold under, a table, a JSON file, a plot."""

import datetime
import json
import pathlib
import platform
from collections.abc import Sequence
from typing import Any

import jax
import jaxlib

from lcx.folders import make_folder
from pallas_kernels.tiles import slug

FOLDER = pathlib.Path("experiments/kernels/results")


def conditions(**more: Any) -> dict[str, Any]:
    """Device, versions and date; figures without them say nothing."""
    device = jax.devices()[0]
    return dict(
        device_kind=device.device_kind,
        platform=device.platform,
        runtime=" ".join(device.client.platform_version.split()),  # of a GPU, the CUDA version
        jax=jax.__version__,
        jaxlib=jaxlib.__version__,
        python=platform.python_version(),
        date=datetime.date.today().isoformat(),
        **more,
    )


def write(result: dict[str, Any], folder: pathlib.Path, name: str = "") -> pathlib.Path:
    """Writes {"conditions", ...} as JSON, into a file named after the device with `name` in front, and says where.

    Raises:
      UserError: the folder cannot be made.
    """
    make_folder(folder, "--out")
    path = folder / f"{name}{slug(result['conditions']['device_kind'])}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def markdown(columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    """Rows as a Markdown table; a cell that is missing is "-"."""
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join(lines + ["| " + " | ".join(_cell(row.get(name)) for name in columns) + " |" for row in rows])


def _cell(value: Any) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, float):
        return f"{value:,.3f}" if value < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def plot_ratios(rows: Sequence[dict[str, Any]], ruler: str, targets: dict[str, float], path: pathlib.Path) -> None:
    """Speed over the ruler's against the length: a panel for each direction, a line for each implementation and problem."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(targets), figsize=(6 * len(targets), 4.2), constrained_layout=True, squeeze=False)
    for axes, (direction, target) in zip(panels[0], targets.items(), strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for row in rows:
            if row["direction"] == direction and row["ratio"] is not None and row["implementation"] != ruler:
                lines.setdefault(f"{row['implementation']}, {row['case']}", []).append((row["S"], row["ratio"]))
        for label, points in lines.items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, label=label)
        axes.axhline(1.0, color="black", linewidth=1)
        axes.axhline(target, color="black", linewidth=1, linestyle="dotted")
        axes.set(xlabel="tokens in a row", ylabel=f"speed / speed of {ruler}", title=direction)
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
        if lines:
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_times(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """Time of a token against the length, logarithmic: a panel for each problem and direction, a line for each implementation
    and, where a device's figures are known, one for the least that it could take."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    problems = list(dict.fromkeys((row["case"], row["direction"]) for row in rows))
    across = min(2, len(problems))
    down = -(-len(problems) // across)
    figure, panels = plt.subplots(down, across, figsize=(6 * across, 4.2 * down), constrained_layout=True, squeeze=False)
    for axes, (case, direction) in zip(panels.flat, problems, strict=False):
        mine = [row for row in rows if (row["case"], row["direction"]) == (case, direction) and row["milliseconds"] is not None]
        of_token = lambda row, what: 1e6 * row[what] / (row["B"] * row["S"])
        for name in dict.fromkeys(row["implementation"] for row in mine):
            points = sorted((row["S"], of_token(row, "milliseconds")) for row in mine if row["implementation"] == name)
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
        if least := sorted({(row["S"], of_token(row, "floor")) for row in mine if row["floor"] is not None}):
            axes.plot(*zip(*least, strict=True), color="black", linewidth=1, linestyle="dotted", label="least possible")
        axes.set(yscale="log", xlabel="tokens in a row", ylabel="nanoseconds a token", title=f"{direction}, {case}")
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
