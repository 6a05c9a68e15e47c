"""What every command of lcx shares: its arguments, its exit status, its one line for a mistake."""

import argparse
import glob
import importlib.util
import os
import sys
from collections.abc import Callable

from lcx.registry import UserError, unknown

REHEARSAL_DEVICES = 8
TPU_DEVICES = ("/dev/accel*", "/dev/vfio/*")  # what Linux shows of a TPU
# Between GPUs XLA has one transfer under way at a time. So what travels in one hop of a ring has to be one message, of any size;
# by default large parts stay apart, and all but one are waited for while nothing is computed.
GPU_OPTIONS = {"xla_gpu_collective_permute_combine_threshold_bytes": 2**40}


def prepare_platform() -> None:
    """Gives a host without accelerators virtual devices, before anything asks for the first one.

    `JAX_NUM_CPU_DEVICES` states another number. Virtual devices share the host's cores and can be late to a collective
    by minutes, so the rendezvous is told to wait. With libtpu installed to compile for TPUs, and no TPU to be seen, JAX is not
    sent to look for one: that takes long and ends in messages about a broken TPU. Programs for GPUs get `GPU_OPTIONS`. What the
    user's `XLA_FLAGS` has stays.
    """
    only_libtpu = importlib.util.find_spec("libtpu") is not None and importlib.util.find_spec("jax_plugins") is None
    if only_libtpu and not any(glob.glob(pattern) for pattern in TPU_DEVICES):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    count = os.environ.setdefault("JAX_NUM_CPU_DEVICES", str(REHEARSAL_DEVICES))
    if not count.isdecimal() or not int(count):
        raise UserError(f"JAX_NUM_CPU_DEVICES={count!r} must be an integer of at least 1")
    options = {"xla_cpu_collective_call_terminate_timeout_seconds": 600}
    if importlib.util.find_spec("jax_plugins") is not None:
        options |= GPU_OPTIONS
    given = os.environ.get("XLA_FLAGS", "")
    added = (f"--{name}={value}" for name, value in options.items() if name not in given)
    os.environ["XLA_FLAGS"] = " ".join([given, *added]).strip()


def arguments(
    parser: argparse.ArgumentParser, argv: list[str], *, trained: bool = False
) -> tuple[argparse.Namespace, dict[str, str]]:
    """The parsed arguments, and the config overrides `--config.a.b=value` as `a.b -> value`.

    Args:
      trained: the command is about the run in --workdir, whose config lies there; else --config names one.

    Raises:
      UserError: an argument that is neither.
    """
    if trained:
        parser.add_argument("--workdir", required=True, help="of the run")
    else:
        parser.add_argument("--config", required=True, metavar="FILE[:ARG]", help="config file, e.g. configs/tiny.py")
        parser.add_argument("--workdir", default="", help="where the run keeps its files (default: runs/<config name>)")
    overrides, rest, i = {}, [], 0
    while i < len(argv):
        if not argv[i].startswith("--config."):
            rest.append(argv[i])
        else:
            name, equals, value = argv[i].removeprefix("--config.").partition("=")
            if not equals:
                i += 1
                if i == len(argv) or argv[i].startswith("--"):
                    raise UserError(f"--config.{name} needs a value: --config.{name}=VALUE")
                value = argv[i]
            overrides[name] = value
        i += 1
    known, left = parser.parse_known_args(rest)
    if left:
        if left[0].partition("=")[0].startswith("config."):
            raise UserError(f"{left[0]!r}: overrides start with two dashes, --{left[0]}")
        raise unknown("argument", left[0], [*([] if trained else ["--config"]), "--config.<field>=VALUE", "--workdir"])
    return known, overrides


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are `UserError`s."""

    def error(self, message: str):
        raise UserError(f"{message} (see --help)")


def status(run: Callable[[list[str]], int | None], argv: list[str]) -> int:
    """Runs a command: 0 on success, 2 after one line on the user's mistake, 130 after Ctrl-C; a failure of ours is raised."""
    try:
        return run(argv) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command starts again from the last checkpoint, if there is one", file=sys.stderr)
        return 130


def main(run: Callable[[list[str]], int | None]) -> None:
    """Runs a command on this process's arguments and exits; 1 with a traceback on a failure of ours."""
    sys.exit(status(run, sys.argv[1:]))
