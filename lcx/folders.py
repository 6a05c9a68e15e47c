"""Folders that a user names."""

import pathlib

from lcx.registry import UserError


def make_folder(path: pathlib.Path, field: str) -> None:
    """Makes a folder, and those above it, where it does not exist.

    Raises:
      UserError: it cannot be made, or a file has its name; names `field`, which said where.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{field}={str(path)!r} cannot be used as a folder: {error.strerror}") from error
