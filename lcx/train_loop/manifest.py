"""A checksum of every file of a checkpoint: a flipped bit in an array file restores without an error otherwise."""

import json
import pathlib

import xxhash

NAME = "lcx_manifest.json"
BLOCK_BYTES = 1 << 22

# Orbax stamps the time of the commit into this file after the manifest is written; it holds no state.
STAMPED_LATER = "_CHECKPOINT_METADATA"


def _digest(file: pathlib.Path) -> str:
    state = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while chunk := stream.read(BLOCK_BYTES):
            state.update(chunk)
    return state.hexdigest()


def _digests(directory: pathlib.Path) -> dict[str, str]:
    files = sorted(f for f in directory.rglob("*") if f.is_file() and f.name not in (NAME, STAMPED_LATER))
    return {str(f.relative_to(directory)): _digest(f) for f in files}


def write(directory: pathlib.Path) -> None:
    """Writes the manifest of what the directory holds now."""
    (directory / NAME).write_text(json.dumps(_digests(directory), indent=0))


def damage(directory: pathlib.Path) -> str | None:
    """None when every file is as it was written, else one line that names the first file that is not."""
    try:
        expected = json.loads((directory / NAME).read_text())
    except (OSError, ValueError):
        return f"{directory / NAME} is missing or unreadable"
    if not isinstance(expected, dict) or not expected:
        return f"{directory / NAME} lists no files"
    try:
        actual = _digests(directory)
    except OSError as error:
        return f"{error.filename or directory} cannot be read ({error.strerror or error})"
    for name, digest in expected.items():
        if name not in actual:
            return f"{directory / name} is missing"
        if actual[name] != digest:
            return f"{directory / name} does not match its checksum"
    return None
