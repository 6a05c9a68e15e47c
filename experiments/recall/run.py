"""Trains both arms of the recall experiment and draws their accuracy. See README.md.

python experiments/recall/run.py [--steps N] [--workdir DIR]
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
LABELS = {"ring": "ring attention: 2 layers, all 256 tokens", "window": "window of 32: 4 layers, reaches back 124 tokens"}
CHANCE = 1 / 16  # the task draws every value uniformly from the 16 that a vocabulary of 32 has


def train(variant: str, workdir: pathlib.Path, extra: list[str]) -> dict:
    """Runs one arm; returns its evaluations and its median seconds per step, which depend on what else the host does."""
    command = [sys.executable, "-m", "lcx.train", "--config", str(HERE / f"config.py:{variant}"), "--workdir", str(workdir)]
    subprocess.run([*command, *extra], check=True)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    keys = ("held_out_loss", "held_out_token_accuracy", "held_out_exact_match")
    return {
        "step_seconds": round(statistics.median(line["step_seconds"] for line in lines if "step_seconds" in line), 3),
        "evaluations": [{key: line[key] for key in ("step", *keys)} for line in lines if keys[0] in line],
    }


def plot(results: dict[str, dict], path: pathlib.Path) -> None:
    """Accuracy against steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), constrained_layout=True)
    for variant, result in results.items():
        steps = [point["step"] for point in result["evaluations"]]
        accuracy = [100 * point["held_out_token_accuracy"] for point in result["evaluations"]]
        axes.plot(steps, accuracy, marker="o", markersize=3, label=LABELS[variant])
    axes.axhline(100 * CHANCE, color="gray", linestyle="--", linewidth=1, label=f"chance: {100 * CHANCE:.2f} %", zorder=1)
    axes.set(xlabel="step", ylabel="answers right on held-out rows, %", xlim=(0, None), ylim=(0, 102))
    axes.set_title("Associative recall, key and query at least 160 tokens apart", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Trains, writes result.json and recall.png, prints the last accuracies."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/recall"))
    args = parser.parse_args()
    extra = [f"--config.train.steps={args.steps}"] if args.steps else []
    results = {variant: train(variant, args.workdir / variant, extra) for variant in LABELS}
    (HERE / "result.json").write_text(json.dumps(results, indent=1) + "\n")
    plot(results, HERE / "recall.png")
    for variant, result in results.items():
        last = result["evaluations"][-1]
        print(f"{LABELS[variant]}: {100 * last['held_out_token_accuracy']:.1f} % of answers right after {last['step']} steps")


if __name__ == "__main__":
    main()
