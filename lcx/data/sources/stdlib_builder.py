"""The TFDS builder behind `stdlib_text`: written and read as ArrayRecord, without TensorFlow."""

import os
import pathlib
import sys
import sysconfig
from collections.abc import Iterator

import tensorflow_datasets as tfds

SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class StdlibText(tfds.core.GeneratorBasedBuilder):
    """Features: path (str, relative to the library), text (str)."""

    VERSION = tfds.core.Version("{}.{}.{}".format(*sys.version_info))

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({"path": tfds.features.Text(), "text": tfds.features.Text()})
        return tfds.core.DatasetInfo(
            builder=self, description="Python's standard library.", features=features, disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, str]]]:
        for key, (path, text) in enumerate(modules(pathlib.Path(sysconfig.get_path("stdlib")))):
            yield key, {"path": path, "text": text}


def modules(root: pathlib.Path) -> Iterator[tuple[str, str]]:
    """(path, text) of the modules below `root`, by path; those that are not UTF-8 are left out."""
    paths = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED]
        paths += [pathlib.Path(folder, name) for name in files if name.endswith(".py")]
    for path in sorted(paths, key=lambda path: path.relative_to(root).as_posix()):
        try:
            yield path.relative_to(root).as_posix(), path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
