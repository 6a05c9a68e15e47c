"""What a token of one layer costs, forward and backward, as the sequence grows: FLOPs, memory, seconds. See README.md.

python experiments/linear_cost/run.py [--lengths 2048 4096 ...]            # tables, result.json and linear_cost.png
"""

import argparse
import datetime
import json
import os
import pathlib
import statistics
import time

from lcx import command

LENGTHS = (2_048, 4_096, 16_384, 65_536, 262_144, 1_048_576)
SIZES = dict(model__dim=64, model__heads=2, model__layers=1, model__dtype="float32", ffn="none", mesh__seq=1, scale="full")
MIXERS = {
    "full": {},
    "blockwise": {},
    # Four branches that reach a million tokens; each keeps 256 keys for a query.
    "longnet": dict(mixers__longnet__segments=(256, 4_096, 65_536, 1_048_576), mixers__longnet__dilations=(1, 16, 256, 4_096)),
    "mamba": {},
    "mamba2": {},
}
FULL_LIMIT = 4_096  # beyond, the gradients of its S x S scores take minutes
LONGEST_SECONDS = 60.0
MEMORY_SHARE = 0.6  # of the host's memory, for the temporaries of a run
REPEATS = 2
HERE = pathlib.Path(__file__).parent


def compiled(mixer: str, length: int):
    """(experiment, the compiled forward and backward pass of one layer)."""
    from lcx import config, experiment
    from lcx.mesh import make_mesh
    from lcx.planning.training import compile_layer

    conf = config.base()
    for field, value in (SIZES | MIXERS[mixer] | dict(pattern=(mixer,), sequence__length=length)).items():
        config.assign(conf, field.replace("__", "."), value, origin="linear_cost")
    chosen = experiment.resolve(conf, length)
    return chosen, compile_layer(chosen, make_mesh())


def seconds(experiment, program) -> float:
    """Median seconds of the compiled pass on random hidden states, the first run left out."""
    import jax

    from lcx.mesh import make_mesh
    from lcx.train_loop.state import init_params, plan_model

    params = init_params(experiment, plan_model(experiment, experiment.model.sizes(vocab=256)), make_mesh())
    x_BSD = jax.random.normal(jax.random.key(1), (1, experiment.sequence.length, experiment.model.dim))
    taken = []
    for _ in range(1 + REPEATS):
        began = time.perf_counter()
        jax.block_until_ready(program(params, x_BSD))
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


def measure(lengths: list[int]) -> dict[str, dict[int, dict[str, float]]]:
    """mixer -> length -> flops, bytes and seconds of one token; without seconds where a run would take more than a minute, or
    more memory than a run may."""
    from lcx.planning.hlo import executed_flops
    from lcx.planning.memory import compiled_bytes

    memory = MEMORY_SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found: dict[str, dict[int, dict[str, float]]] = {}
    for mixer in MIXERS:
        found[mixer], speed = {}, None
        for length in lengths:
            if mixer == "full" and length > FULL_LIMIT:
                continue
            experiment, program = compiled(mixer, length)
            flops, temporary = executed_flops(program.as_text()), compiled_bytes(program)["temporary"]
            cost = {"flops": flops / length, "bytes": temporary / length}
            # How long it would take is known from the length before it.
            if temporary <= memory and (speed is None or flops * speed <= LONGEST_SECONDS):
                took = seconds(experiment, program)
                cost["seconds"], speed = took / length, took / flops
            found[mixer][length] = cost
            print(f"{mixer:10}{length:>10,}  " + "  ".join(f"{name} {value:.4g}" for name, value in cost.items()), flush=True)
    return found


def table(found: dict[str, dict[int, dict[str, float]]], what: str, scale: float, digits: int) -> str:
    """One figure of every mixer and length as Markdown, and in the last row the longest length over the shortest."""
    lengths = sorted({length for by_length in found.values() for length in by_length})
    rows = ["| tokens | " + " | ".join(found) + " |", "|---" * (len(found) + 1) + "|"]
    value = lambda mixer, length: found[mixer].get(length, {}).get(what)
    show = lambda x: "-" if x is None else f"{x / scale:,.{digits}f}"
    rows += [f"| {n:,} | " + " | ".join(show(value(mixer, n)) for mixer in found) + " |" for n in lengths]
    known = {mixer: [value(mixer, n) for n in lengths if value(mixer, n) is not None] for mixer in found}
    return "\n".join([*rows, "| last / first | " + " | ".join(f"{x[-1] / x[0]:.2f}" for x in known.values()) + " |"])


def plot(found: dict[str, dict[int, dict[str, float]]], path: pathlib.Path) -> None:
    """Time and memory of a token against the length, logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), constrained_layout=True)
    for axes, what, scale, label in (
        (panels[0], "seconds", 1e-6, "time per token, microseconds"),
        (panels[1], "bytes", 2**10, "temporary memory per token, KiB"),
    ):
        for mixer, by_length in found.items():
            known = {n: cost[what] / scale for n, cost in by_length.items() if what in cost}
            axes.plot(list(known), list(known.values()), marker="o", markersize=4, label=mixer)
        axes.set(yscale="log", xlabel="tokens in the sequence", ylabel=label)
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3, which="both")
    panels[0].legend()
    figure.suptitle("One layer, forward and backward, for each token (D=64, fp32, batch 1, CPU)", fontsize=11)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measures, prints and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens in a sequence")
    lengths = sorted(parser.parse_args().lengths)
    command.prepare_platform()
    import jax

    conditions = {"jax": jax.__version__, "cores": os.cpu_count(), "date": datetime.date.today().isoformat()}
    found = measure(lengths)
    (HERE / "result.json").write_text(json.dumps({"conditions": conditions, "per_token": found}, indent=1) + "\n")
    plot(found, HERE / "linear_cost.png")
    for title, *which in (
        ("FLOPs per token, thousands", "flops", 1e3, 0),
        ("temporary memory per token, KiB", "bytes", 2**10, 2),
        ("microseconds per token", "seconds", 1e-6, 1),
    ):
        print(f"\n{title}\n\n{table(found, *which)}")
    print(f"\nwrote {HERE / 'result.json'} and {HERE / 'linear_cost.png'}")


if __name__ == "__main__":
    main()
