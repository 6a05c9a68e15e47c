"""`hf:<name>`: a dataset of the Hugging Face hub, or a local folder in its format."""

import dataclasses
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from lcx.data.sources.network import unreachable
from lcx.registry import UserError, unknown


@dataclasses.dataclass(frozen=True)
class Config:
    """Attributes:
    subset: the dataset's configuration; "" where it has one only.
    split: split, slices such as train[:10%] included.
    text_key: the column that holds the text.
    revision: branch, tag or commit. A branch that moves on is not noticed: name a commit to be exact.
    """

    subset: str = ""
    split: str = "train"
    text_key: str = "text"
    revision: str = "main"


class HuggingFace:
    """The rows of a dataset, a document each.

    Raises:
      UserError: the package `datasets` is missing; the hub cannot be reached and there is no copy in its cache; the dataset,
        subset, split or column does not exist.
    """

    Config = Config
    generated = False
    holds_tokens = False

    def __init__(self, config: Config, name: str):
        self._config = config
        self._name = name

    def identity(self, cache_dir: pathlib.Path) -> dict[str, Any]:
        return {"dataset": self._name} | dataclasses.asdict(self._config)

    def documents(self, cache_dir: pathlib.Path) -> Iterator[str]:
        config = self._config
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        local = pathlib.Path(self._name).is_dir()
        reason = "" if local else "HF_HUB_OFFLINE=1" if os.environ.get("HF_HUB_OFFLINE") == "1" else unreachable(endpoint)
        if reason:
            # Read when the package is imported; without it every file is asked for five times before the cache is used.
            os.environ["HF_HUB_OFFLINE"] = "1"
        try:
            import datasets
        except ImportError:
            raise UserError(f"data.source='hf:{self._name}' needs the package `datasets`: pip install 'lcx[hf]'") from None
        options = {} if local else {"revision": config.revision}
        try:
            rows = datasets.load_dataset(
                self._name,
                config.subset or None,
                split=config.split,
                **options,
            )
        except Exception as error:  # the hub client, the readers and the datasets all have errors of their own
            line = (str(error).strip().splitlines() or [""])[0]
            offline = f"{endpoint} cannot be reached ({reason}) and there is no copy in the cache: " if reason else ""
            raise UserError(f"data.source='hf:{self._name}' cannot be loaded: {offline}{type(error).__name__}: {line}") from error
        if config.text_key not in rows.column_names:
            raise unknown("datasets.hf.text_key", config.text_key, rows.column_names)
        for row in rows:
            yield row[config.text_key]
