"""How much temporary memory one layer needs, forward and backward, against the length of the sequence.

python experiments/layer_memory/run.py            # table and plot
"""

import argparse
import json
import pathlib

from lcx import command

VARIANTS = {
    "vanilla": dict(pattern=("full",), block__token_chunk=0),
    "flash": dict(pattern=("blockwise",), block__token_chunk=0),
    "MST": dict(pattern=("blockwise",), block__token_chunk=512),
    "BPT": dict(pattern=("blockwise",), block__token_chunk=512, block__fuse_attention=True),
}
SIZES = dict(model__dim=256, model__heads=4, model__head_dim=64, ffns__gated__width=2048, model__layers=1, model__dtype="float32")
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
HERE = pathlib.Path(__file__).parent


def measure(lengths) -> dict[str, dict[int, int]]:
    """variant -> length -> temporary bytes; vanilla stops at 16,384 tokens, where its scores alone take 4 GiB."""
    from lcx import config, experiment
    from lcx.mesh import make_mesh
    from lcx.planning.memory import compiled_bytes
    from lcx.planning.training import compile_layer

    mesh, found = make_mesh(), {}
    for variant, fields in VARIANTS.items():
        for length in lengths:
            if variant == "vanilla" and length > 16_384:
                continue
            conf = config.base()
            for field, value in (SIZES | fields | {"sequence__length": length, "mesh__seq": 1, "scale": "full"}).items():
                config.assign(conf, field.replace("__", "."), value, origin="layer_memory")
            found.setdefault(variant, {})[length] = compiled_bytes(compile_layer(experiment.resolve(conf, length), mesh))[
                "temporary"
            ]
    return found


def table(found: dict[str, dict[int, int]]) -> str:
    """The figures as a Markdown table in MiB."""
    lengths = sorted({length for by_length in found.values() for length in by_length})
    rows = ["| tokens | " + " | ".join(found) + " |", "|---" * (len(found) + 1) + "|"]
    for length in lengths:
        cells = [f"{found[v][length] / 2**20:,.0f}" if length in found[v] else "-" for v in found]
        rows.append(f"| {length:,} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def plot(found: dict[str, dict[int, int]], path: pathlib.Path) -> None:
    """Memory against length, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), constrained_layout=True)
    for variant, by_length in found.items():
        axes.plot(list(by_length), [b / 2**20 for b in by_length.values()], marker="o", label=variant)
    axes.set(xscale="log", yscale="log", xlabel="tokens in the sequence", ylabel="temporary memory of one layer, MiB")
    axes.set_xscale("log", base=2)
    axes.set_title("One layer, forward and backward (D=256, F=2048, fp32, CPU compiler)", fontsize=10)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measures, prints and draws."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="*", default=LENGTHS)
    lengths = parser.parse_args().lengths
    command.prepare_platform()
    found = measure(lengths)
    print(table(found))
    (HERE / "result.json").write_text(json.dumps(found, indent=1) + "\n")
    plot(found, HERE / "memory.png")
    print(f"wrote {HERE / 'result.json'} and {HERE / 'memory.png'}")


if __name__ == "__main__":
    main()
