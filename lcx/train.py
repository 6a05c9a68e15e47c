"""python -m lcx.train --config FILE[:ARG] [--workdir DIR] [--config.<field>=VALUE ...]"""

import pathlib

from lcx import command


def run(argv: list[str]) -> int:
    """Trains; 0 when the run finished or was asked to stop, 1 when it diverged."""
    parser = command.Parser(prog="python -m lcx.train", description="Train a model on long sequences.", allow_abbrev=False)
    args, overrides = command.arguments(parser, argv)
    command.prepare_platform()

    # Imported here, because the first import of JAX must come after the platform is prepared.
    from lcx import experiment, mesh
    from lcx.train_loop.loop import Run

    mesh.initialize_distributed()
    chosen = experiment.load(args.config, overrides)
    workdir = pathlib.Path(args.workdir or f"runs/{chosen.run.name}")
    summary = Run(chosen, workdir).train()
    return 1 if summary["ending"] == "diverged" else 0


if __name__ == "__main__":
    command.main(run)
