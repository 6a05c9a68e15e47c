"""python -m lcx.evaluate --workdir DIR [--config.<field>=VALUE ...]

Evaluates a trained run on held-out data, at another sequence length or on other data if asked:

    python -m lcx.evaluate --workdir runs/tiny --config.sequence.length=16384 --config.train.batch=1
"""

import pathlib

from lcx import command


def run(argv: list[str]) -> int:
    """Evaluates, prints a table and writes evaluation-<sequence length>.json into the workdir."""
    description = "Evaluate a trained run on held-out data; overrides may not change the shapes of its parameters."
    parser = command.Parser(prog="python -m lcx.evaluate", description=description, allow_abbrev=False)
    args, overrides = command.arguments(parser, argv, trained=True)
    command.prepare_platform()

    # Imported here, because the first import of JAX must come after the platform is prepared.
    from lcx import mesh
    from lcx.train_loop import trained

    mesh.initialize_distributed()
    workdir = pathlib.Path(args.workdir)
    trained.evaluate_run(trained.load(workdir, overrides), workdir)
    return 0


if __name__ == "__main__":
    command.main(run)
