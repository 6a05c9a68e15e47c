"""`tfds:<name>`: a dataset of the TensorFlow Datasets catalogue, read without TensorFlow."""

import contextlib
import dataclasses
import difflib
import io
import logging
import pathlib
from collections.abc import Iterator
from typing import Any

from lcx.data.sources.network import unreachable
from lcx.registry import UserError, unknown


@dataclasses.dataclass(frozen=True)
class Config:
    """Attributes:
    split: TFDS split, slices such as train[:10%] included.
    text_key: the feature that holds the text.
    data_dir: where TFDS keeps its datasets; "" is <data.cache_dir>/tfds.
    """

    split: str = "train"
    text_key: str = "text"
    data_dir: str = ""


class Tfds:
    """A prepared dataset is read where it lies; otherwise it is downloaded and prepared as ArrayRecord files.

    Raises:
      UserError: not in the catalogue; its files cannot be downloaded (said at once, not after minutes of retries); it can
        only be prepared with TensorFlow; no such split or feature.
    """

    Config = Config
    generated = False
    holds_tokens = False

    def __init__(self, config: Config, name: str):
        self._config = config
        self._name = name

    def identity(self, cache_dir: pathlib.Path) -> dict[str, Any]:
        options = dataclasses.asdict(self._config) | {"data_dir": ""}
        return options | {"dataset": self._builder(cache_dir).info.full_name}

    def documents(self, cache_dir: pathlib.Path) -> Iterator[str]:
        builder = self._builder(cache_dir)
        with quiet():
            if not builder.data_path.exists():
                self._download(builder)
            if self._config.text_key not in builder.info.features:
                raise unknown("datasets.tfds.text_key", self._config.text_key, builder.info.features)
            try:
                records = builder.as_data_source(self._config.split)
            except ValueError:
                raise unknown("datasets.tfds.split", self._config.split, builder.info.splits) from None
        for record in records:
            value = record[self._config.text_key]
            yield value.decode("utf-8") if isinstance(value, bytes) else value

    def _builder(self, cache_dir: pathlib.Path) -> Any:
        data_dir = self._config.data_dir or str(cache_dir / "tfds")
        with quiet():
            import tensorflow_datasets as tfds

            try:
                builder = tfds.builder(self._name, data_dir=data_dir)
            except tfds.core.DatasetNotFoundError:
                near = difflib.get_close_matches(self._name, tfds.list_builders(with_community_datasets=False), n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise UserError(f"data.source='tfds:{self._name}' is not in the TFDS catalogue nor in {data_dir}{hint}") from None
            except (ImportError, TypeError, ValueError) as error:
                raise UserError(f"data.source='tfds:{self._name}' cannot be opened: {_first_line(error)}") from None
            return (
                builder if builder.data_path.exists() else tfds.builder(self._name, data_dir=data_dir, file_format="array_record")
            )

    def _download(self, builder: Any) -> None:
        what = f"data.source='tfds:{self._name}' must be downloaded"
        elsewhere = "prepare it where there is a network and name its folder in datasets.tfds.data_dir"
        for url in list(builder.url_infos)[:1]:
            if reason := unreachable(url):
                raise UserError(f"{what} and {url} cannot be reached ({reason}); {elsewhere}")
        try:
            builder.download_and_prepare()
        except ImportError as error:
            raise UserError(
                f"data.source='tfds:{self._name}' can be prepared only with a package that is missing: {_first_line(error)}"
            ) from None
        except Exception as error:  # whatever the dataset's own code raises
            raise UserError(f"{what} and that failed: {type(error).__name__}: {_first_line(error)}; {elsewhere}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the progress bars, notices and log lines of TFDS off the terminal; errors still raise."""
    logger = logging.getLogger("absl")
    level = logger.level
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        import tensorflow_datasets as tfds

        tfds.disable_progress_bar()
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
