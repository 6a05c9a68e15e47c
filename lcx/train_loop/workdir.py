"""The directory of a run, which belongs to one run at a time."""

import contextlib
import fcntl
import pathlib
from collections.abc import Iterator

import jax

from lcx.folders import make_folder
from lcx.registry import UserError


@contextlib.contextmanager
def claim(workdir: pathlib.Path) -> Iterator[None]:
    """Makes the directory and holds it: a second run in it would delete the first one's unfinished checkpoint.

    Raises:
      UserError: it cannot be made or written to, or another run holds it.
    """
    try:
        make_folder(workdir, "--workdir")
        lock = (workdir / ".lock").open("w")
    except OSError as error:
        raise UserError(f"--workdir={str(workdir)!r} cannot be written to: {error.strerror}") from error
    with lock:
        if jax.process_index() == 0:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UserError(f"--workdir={workdir} is in use by another run; stop it or choose another") from error
        yield
