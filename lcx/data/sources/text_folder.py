"""A folder of UTF-8 text files, one document each."""

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import xxhash

from lcx.registry import UserError


@dataclasses.dataclass(frozen=True)
class Config:
    """Attributes:
    path: the folder.
    pattern: which files in it; ** goes down into subfolders.
    """

    path: str = ""
    pattern: str = "**/*.txt"


class TextFolder:
    """The files of a folder by path. Each is held in memory while it is tokenized. A changed file is noticed by size and time.

    Raises:
      UserError: no folder, no file, or a file that is not UTF-8.
    """

    Config = Config
    generated = False
    holds_tokens = False

    def __init__(self, config: Config):
        self._root = pathlib.Path(config.path)
        if not config.path or not self._root.is_dir():
            raise UserError(f"datasets.text_folder.path={config.path!r} must be a folder of text files")
        try:
            files = [path for path in self._root.glob(config.pattern) if path.is_file()]
        except (ValueError, NotImplementedError) as error:
            field = f"datasets.text_folder.pattern={config.pattern!r}"
            raise UserError(f"{field} must be relative to the folder, such as '**/*.txt': {error}") from None
        self._files = sorted(files, key=lambda path: path.relative_to(self._root).as_posix())
        if not self._files:
            raise UserError(
                f"datasets.text_folder.path={config.path!r} holds no file like datasets.text_folder.pattern={config.pattern!r}"
            )

    def identity(self, cache_dir: pathlib.Path) -> dict[str, Any]:
        files = [(path.relative_to(self._root).as_posix(), path.stat().st_size, path.stat().st_mtime_ns) for path in self._files]
        return {"files": xxhash.xxh3_64_hexdigest(repr(files).encode())}

    def documents(self, cache_dir: pathlib.Path) -> Iterator[str]:
        for path in self._files:
            try:
                yield path.read_bytes().decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path} is not UTF-8 text: {error}") from None
