"""Trains every mixer on both tasks at 256 tokens, evaluates it on rows up to 1,024 times as long, draws. See README.md.

python experiments/induction/run.py [--only induction-mamba ...] [--steps N] [--workdir DIR]
"""

import argparse
import contextlib
import io
import json
import pathlib
import subprocess
import sys

from lcx import command

HERE = pathlib.Path(__file__).parent
TASKS = {"induction": "induction heads", "selective_copy": "selective copying, 8 tokens"}
MIXERS = {"mamba": "Mamba", "mamba2": "Mamba-2", "rope": "attention, RoPE", "alibi": "attention, ALiBi"}
CHANCE = {"induction": 1 / 15, "selective_copy": 1 / 14}  # of as many tokens, each as likely
TRAINED = 256
LENGTHS = (256, 512, 1_024, 2_048, 4_096, 8_192, 16_384, 65_536, 262_144)
LONGEST = {"rope": 16_384, "alibi": 16_384}  # a row of 65,536 tokens would take attention a minute
ROWS = 256  # fewer where they would be more tokens than these, but no fewer than 32
TOKENS = {"mamba": 2**22, "mamba2": 2**22, "rope": 2**20, "alibi": 2**20}


def train(variant: str, workdir: pathlib.Path, extra: list[str]) -> dict:
    """Trains one arm, or finds it trained; its parameters, steps, and median seconds per step."""
    config = ["--config", str(HERE / f"config.py:{variant}"), "--workdir", str(workdir)]
    subprocess.run([sys.executable, "-m", "lcx.train", *config, *extra], check=True)
    summary = json.loads((workdir / "summary.json").read_text())
    parameters = json.loads((workdir / "run.json").read_text())["parameters"]["total"]
    return {"parameters": parameters, "steps": summary["step"], "step_seconds": summary["last_step"]["step_seconds"]}


def evaluate(task: str, mixer: str, length: int, workdir: pathlib.Path) -> dict:
    """What the trained arm answers on held-out rows of another length: rows, loss, token_accuracy, exact_match."""
    from lcx.train_loop import trained

    rows = max(32, min(ROWS, TOKENS[mixer] // length))
    batch = max(2, min(16, 2**17 // length))
    overrides = {
        "sequence.length": length,
        "train.batch": batch,
        "evaluate.batches": rows // batch,
        f"datasets.{task}.held_out_rows": rows,
        "datasets.induction.distance": "uniform",
    }
    with contextlib.redirect_stdout(io.StringIO()):
        experiment = trained.load(workdir, {field: str(value) for field, value in overrides.items()})
        held_out = trained.evaluate_run(experiment, workdir)["held_out"]
    found = {"rows": rows} | {key: held_out[key] for key in ("loss", "token_accuracy", "exact_match")}
    print(f"{task} {mixer} {length:,}: {100 * found['token_accuracy']:.1f} % of answers right", flush=True)
    return found


def table(task: str, results: dict[str, dict]) -> str:
    """Answers right, %, by length and mixer, as Markdown."""
    arms = {mixer: results[f"{task}-{mixer}"]["evaluations"] for mixer in MIXERS if f"{task}-{mixer}" in results}
    rows = ["| tokens | " + " | ".join(MIXERS[mixer] for mixer in arms) + " |", "|---" * (len(arms) + 1) + "|"]
    for length in LENGTHS:
        found = [by_length.get(str(length)) for by_length in arms.values()]
        cells = ["-" if one is None else f"{100 * one['token_accuracy']:.1f}" for one in found]
        rows.append(f"| {length:,} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def plot(results: dict[str, dict], path: pathlib.Path) -> None:
    """Accuracy against length, a panel for each task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True, constrained_layout=True)
    for axes, task in zip(panels, TASKS, strict=True):
        for mixer, label in MIXERS.items():
            if f"{task}-{mixer}" in results:
                points = {int(n): x["token_accuracy"] for n, x in results[f"{task}-{mixer}"]["evaluations"].items()}
                axes.plot(list(points), [100 * x for x in points.values()], marker="o", markersize=4, label=label)
        axes.axhline(100 * CHANCE[task], color="gray", linestyle="--", linewidth=1, label="chance", zorder=1)
        axes.axvline(TRAINED, color="gray", linestyle=":", linewidth=1, label="length of the training rows", zorder=1)
        axes.set_xscale("log", base=2)
        axes.set(xlabel="tokens in a row", ylim=(0, 102))
        axes.set_title(TASKS[task], fontsize=10)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("answers right on held-out rows, %")
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Trains, evaluates, writes result.json and induction.png, prints the tables."""
    variants = [f"{task}-{mixer}" for task in TASKS for mixer in MIXERS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=variants, default=variants, help="arms; the results of others are kept")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/induction"))
    args = parser.parse_args()
    extra = [f"--config.train.steps={args.steps}"] if args.steps else []
    command.prepare_platform()
    file = HERE / "result.json"
    results = json.loads(file.read_text()) if file.exists() and args.only != variants else {}
    for variant in args.only:
        task, mixer = variant.split("-")
        workdir = args.workdir / variant
        results[variant] = train(variant, workdir, extra) | {"evaluations": {}}
        for length in LENGTHS:
            if length <= LONGEST.get(mixer, LENGTHS[-1]):
                results[variant]["evaluations"][str(length)] = evaluate(task, mixer, length, workdir)
        file.write_text(json.dumps({name: results[name] for name in variants if name in results}, indent=1) + "\n")
    plot(results, HERE / "induction.png")
    for task in TASKS:
        print(f"\n{TASKS[task]}: answers right, %\n\n{table(task, results)}")


if __name__ == "__main__":
    main()
