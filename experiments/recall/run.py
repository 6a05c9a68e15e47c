"""Trains both arms of the recall experiment and draws their accuracy. See README.md.

python experiments/recall/run.py [--steps N]
"""

import argparse
import json
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
LABELS = {"ring": "ring attention, 2 layers, all 512 tokens", "window": "window of 64, 4 layers, reaches 256 tokens"}


def train(variant: str, workdir: pathlib.Path, extra: list[str]) -> list[dict]:
    """Runs one arm and returns its evaluations."""
    command = [sys.executable, "-m", "lcx.train", "--config", str(HERE / f"config.py:{variant}"), "--workdir", str(workdir)]
    subprocess.run([*command, *extra], check=True)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    keys = ("held_out_loss", "held_out_token_accuracy", "held_out_exact_match")
    return [{"step": line["step"]} | {key: line[key] for key in keys} for line in lines if keys[0] in line]


def plot(results: dict[str, list[dict]], path: pathlib.Path) -> None:
    """Accuracy against steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), constrained_layout=True)
    for variant, points in results.items():
        accuracy = [100 * point["held_out_token_accuracy"] for point in points]
        axes.plot([point["step"] for point in points], accuracy, marker="o", markersize=3, label=LABELS[variant])
    axes.set(xlabel="step", ylabel="answers right on held-out rows, %", ylim=(-2, 102))
    axes.set_title("Associative recall, key and query at least 320 tokens apart", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(loc="center right")
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
    for variant, points in results.items():
        accuracy = 100 * points[-1]["held_out_token_accuracy"]
        print(f"{LABELS[variant]}: {accuracy:.1f} % of answers right after {points[-1]['step']} steps")


if __name__ == "__main__":
    main()
