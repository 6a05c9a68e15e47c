"""Sources and `python -m lcx.data.prepare`: nothing here uses the network."""

import dataclasses
import multiprocessing
import os
import pathlib
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest

from lcx import command
from lcx.data import DATASETS, build_source, load_source
from lcx.data.config import DataConfig
from lcx.data.prepare import prepare, run
from lcx.data.sources import hf, text_folder, tfds, token_file
from lcx.registry import UserError, config_fields


def documents(store):
    return [store.tokenizer.decode(store.read(a, b)) for a, b in zip(store.offsets[:-1], store.offsets[1:])]


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "texts"
    (root / "deep").mkdir(parents=True)
    for name, text in {"b.txt": "second ä", "a.txt": "first", "deep/c.txt": "third", "d.md": "other"}.items():
        (root / name).write_text(text, encoding="utf-8")
    return root


def test_every_config_has_plain_defaults():
    for name in DATASETS:
        config = load_source(name if name not in ("tfds", "hf") else f"{name}:x")[0].Config
        assert dataclasses.is_dataclass(config) and config.__dataclass_params__.frozen
        assert all(isinstance(value, str | int | float | bool | tuple) for value in config_fields(config).values())
    assert all(isinstance(value, str | int | float | bool) for value in config_fields(DataConfig).values())


def test_unknown_sources():
    for source, match in {
        "stdlibtext": "did you mean 'stdlib_text'",
        "tfds": "tfds:<name>",
        "hf:": "hf:<name>",
        "copy:x": "written copy",
    }.items():
        with pytest.raises(UserError, match=match):
            build_source(source)


def test_standard_library(tmp_path):
    config = DataConfig(cache_dir=str(tmp_path))
    store = prepare(config)
    assert store.num_tokens > 5_000_000 and store.num_documents > 400 and store.vocab_size == 256
    texts = documents(store)
    assert pathlib.Path(dataclasses.__file__).read_text(encoding="utf-8") in texts
    assert texts[0] == (pathlib.Path(os.__file__).parent / "__future__.py").read_text(encoding="utf-8")
    assert any((tmp_path / "tfds" / "stdlib_text").rglob("*.array_record*"))
    made = store.directory.stat().st_mtime_ns
    assert prepare(config).directory.stat().st_mtime_ns == made, "prepared once"
    # The same builder's files, found by name as a dataset of the catalogue would be.
    again = prepare(DataConfig(source="tfds:stdlib_text", cache_dir=str(tmp_path)), tfds.Config(split="train[:10]"))
    assert documents(again) == texts[:10]
    with pytest.raises(UserError, match="datasets.tfds.text_key='txt'.*did you mean 'text'"):
        prepare(DataConfig(source="tfds:stdlib_text", cache_dir=str(tmp_path)), tfds.Config(text_key="txt"))
    with pytest.raises(UserError, match="datasets.tfds.split='test'.*valid: train"):
        prepare(DataConfig(source="tfds:stdlib_text", cache_dir=str(tmp_path)), tfds.Config(split="test"))


def test_preparing_is_silent(tmp_path, capfd):
    prepare(DataConfig(cache_dir=str(tmp_path)))
    assert capfd.readouterr() == ("", "")


def test_text_folder(tmp_path, folder):
    config = DataConfig(source="text_folder", cache_dir=str(tmp_path / "cache"))
    store = prepare(config, text_folder.Config(path=str(folder)))
    assert documents(store) == ["first", "second ä", "third"]
    assert documents(prepare(config, text_folder.Config(path=str(folder), pattern="*.md"))) == ["other"]
    (folder / "a.txt").write_text("changed")
    assert documents(prepare(config, text_folder.Config(path=str(folder))))[0] == "changed"
    (folder / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="a.txt is not UTF-8"):
        prepare(config, text_folder.Config(path=str(folder)))
    assert not list((tmp_path / "cache").glob(".*-*")), "a failure leaves nothing half made"
    for changes in (dict(path=""), dict(path="nowhere"), *(dict(path=str(folder), pattern=p) for p in ("*.rst", "", "/*.txt"))):
        with pytest.raises(UserError, match="datasets.text_folder"):
            prepare(config, text_folder.Config(**changes))


def test_more_ids_than_a_token_can_name_are_one_line():
    with pytest.raises(UserError, match="data.source='copy' would have 3000000001 ids"):
        build_source("copy", load_source("copy")[0].Config(symbols=3_000_000_000))


def test_a_cache_dir_that_is_a_file_is_one_line(tmp_path, folder):
    config = DataConfig(source="text_folder", cache_dir=str(folder / "a.txt"))
    with pytest.raises(UserError, match="data.cache_dir='.*a.txt' cannot be used as a folder"):
        prepare(config, text_folder.Config(path=str(folder)))


def test_what_a_killed_preparation_left_is_removed_after_a_day(tmp_path, folder):
    config = DataConfig(source="text_folder", cache_dir=str(tmp_path / "cache"))
    store = prepare(config, text_folder.Config(path=str(folder))).directory
    old, young = (store.with_name(f".{store.name}.{name}") for name in ("old", "young"))
    for left in (old, young):
        left.mkdir()
        (left / "tokens.bin").write_bytes(b"half")
    for path in (old / "tokens.bin", old):
        os.utime(path, (0, 0))
    shutil.rmtree(store)
    prepare(config, text_folder.Config(path=str(folder)))
    assert store.exists() and young.exists() and not old.exists()


def test_token_file(tmp_path):
    ids = np.array([5, 6, 9, 7, 9, 9, 300], np.uint16)
    ids.tofile(tmp_path / "flat.bin")
    np.save(tmp_path / "array.npy", ids.astype(np.int64))
    config = DataConfig(source="token_file", tokenizer="ids", cache_dir=str(tmp_path / "cache"))
    for name in ("flat.bin", "array.npy"):
        path = str(tmp_path / name)
        store = prepare(config, token_file.Config(path=path, document_end=9))
        assert documents(store) == ["5 6 9", "7 9", "9", "300"] and store.vocab_size == 301
        store = prepare(config, token_file.Config(path=path, vocab_size=50000))
        assert store.num_documents == 1 and store.vocab_size == 50000
    flat = str(tmp_path / "flat.bin")
    (tmp_path / "odd.bin").write_bytes(b"123")
    np.save(tmp_path / "square.npy", np.zeros((2, 2), np.int32))
    for changes, tokenizer, match in [
        (dict(path=flat, vocab_size=300), "ids", "holds id 300.*vocab_size is 300"),
        (dict(path=flat), "bytes", "holds id 300.*vocabulary is 256.*or 'ids'"),
        (dict(path=flat, vocab_size=400), "bytes", "only with data.tokenizer='ids'"),
        (dict(path=flat, dtype="float32"), "ids", "datasets.token_file.dtype='float32'"),
        (dict(path=str(tmp_path / "odd.bin")), "ids", "not a flat array of uint16"),
        (dict(path=str(tmp_path / "square.npy")), "ids", "not a row of ids"),
        (dict(path="missing.bin"), "ids", "must be a file"),
    ]:
        with pytest.raises(UserError, match=match):
            prepare(dataclasses.replace(config, tokenizer=tokenizer), token_file.Config(**changes))


def test_unreachable_catalogues_say_so_at_once(tmp_path, monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(
        UserError, match="tfds:lm1b' must be downloaded and http.* cannot be reached .*refused.*datasets.tfds.data_dir"
    ):
        prepare(DataConfig(source="tfds:lm1b", cache_dir=str(tmp_path)))
    with pytest.raises(UserError, match="did you mean 'lm1b'"):
        prepare(DataConfig(source="tfds:lm1c", cache_dir=str(tmp_path)))


def _fake_hub(monkeypatch, load_dataset):
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))


class _Rows(list):
    column_names = ("text", "id")


def test_hugging_face(tmp_path, monkeypatch):
    config = DataConfig(source="hf:owner/name", cache_dir=str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'lcx\[hf\]'"):
        prepare(config)
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        return _Rows([{"text": "one", "id": 1}, {"text": "two", "id": 2}])

    _fake_hub(monkeypatch, load_dataset)
    assert documents(prepare(config, hf.Config(subset="en", revision="v1"))) == ["one", "two"]
    assert asked == [(("owner/name", "en"), dict(split="train", revision="v1"))]
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(UserError, match="datasets.hf.text_key='body'"):
        prepare(config, hf.Config(text_key="body"))

    def missing(*arguments, **options):
        raise FileNotFoundError("no such dataset\nand more")

    _fake_hub(monkeypatch, missing)
    with pytest.raises(UserError, match="cannot be reached .*no copy in the cache: FileNotFoundError: no such dataset$"):
        prepare(config)


def _prepare_slowly(folder, cache, counter):
    original = text_folder.TextFolder.documents

    def counted(self, cache_dir):
        with counter.get_lock():
            counter.value += 1
        __import__("time").sleep(0.3)
        yield from original(self, cache_dir)

    text_folder.TextFolder.documents = counted
    prepare(DataConfig(source="text_folder", cache_dir=cache), text_folder.Config(path=folder))


def test_processes_that_ask_at_once_prepare_once(tmp_path, folder):
    context = multiprocessing.get_context("spawn")
    counter = context.Value("i", 0)
    processes = [context.Process(target=_prepare_slowly, args=(str(folder), str(tmp_path / "cache"), counter)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0] and counter.value == 1
    assert len(list((tmp_path / "cache").glob("text_folder-*"))) == 1


def test_command(tmp_path, folder, capsys):
    arguments = ["--source", "text_folder", "--cache_dir", str(tmp_path), "--option", f"path={folder}"]
    assert command.status(run, arguments) == 0
    out = capsys.readouterr().out
    assert "prepared" in out and "documents   3" in out and str(tmp_path) in out
    assert command.status(run, arguments) == 0
    assert "was there" in capsys.readouterr().out
    (tokens,) = tmp_path.glob("text_folder-*/tokens.bin")
    tokens.write_bytes(b"?" * tokens.stat().st_size)
    assert command.status(run, arguments) == 2
    assert "does not match its checksum" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, match",
    [
        (["--source", "stdlib_txt"], "did you mean 'stdlib_text'"),
        (["--source", "copy"], "nothing to prepare"),
        (["--tokenizer", "byte"], "data.tokenizer='byte'"),
        (["--tokenizer", "ids"], "data.tokenizer='ids' is for token files"),
        (["--option", "a=1"], "has no options"),
        (["--source", "token_file", "--option", "vocab_size=many"], "must be of type int"),
        (["--source", "token_file", "--option", "vocab_sizes=1"], "did you mean 'vocab_size'"),
        (["--source", "token_file", "--option", "path"], "key=value"),
        (["--sauce", "x"], "unrecognized arguments"),
    ],
)
def test_mistakes_are_one_line_and_status_2(tmp_path, capsys, arguments, match):
    assert command.status(run, ["--cache_dir", str(tmp_path), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1 and match in captured.err


def test_command_as_a_process(tmp_path):
    run = subprocess.run([sys.executable, "-m", "lcx.data.prepare", "--source", "no"], capture_output=True, text=True, timeout=60)
    assert run.returncode == 2 and run.stderr.startswith("error: ") and "Traceback" not in run.stderr
