"""Prepares a token store: `python -m lcx.data.prepare --source stdlib_text --cache_dir data`."""

import ast
import contextlib
import fcntl
import json
import os
import pathlib
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from typing import Any

import xxhash

from lcx import command
from lcx.data import build_source, load_source, tokenizers
from lcx.data.config import DataConfig
from lcx.data.sources import Source
from lcx.data.store import FORMAT, StoreWriter, TokenStore
from lcx.folders import make_folder
from lcx.registry import UserError, config_fields, unknown


def prepare(config: DataConfig, source_config: Any = None) -> TokenStore:
    """The token store of a source: opened if it is there, else made.

    A store lies in `<cache_dir>/<source>-<fingerprint>`; source, its options and the tokenizer decide the fingerprint. It
    appears there whole, by a rename. Processes that ask at once, on one host or over a shared file system, wait for the
    first of them; hosts with disks of their own each make one.

    Args:
      config: the shared options.
      source_config: a `Config` of the source, None for its defaults.

    Raises:
      UserError: whatever is wrong with source, tokenizer or an existing store; a task, which needs no store.
    """
    return prepare_source(config, _source(config, source_config))


def _source(config: DataConfig, source_config: Any) -> Source:
    part = build_source(config.source, source_config)
    if part.generated:
        raise UserError(f"data.source={config.source!r} is generated while it is read: there is nothing to prepare")
    return part


def prepare_source(config: DataConfig, source: Source) -> TokenStore:
    """`prepare` for a source that is already built."""
    return _open_or_make(config, source)[0]


def _open_or_make(config: DataConfig, source: Source) -> tuple[TokenStore, bool]:
    """The store, and whether this call made it."""
    cache_dir = pathlib.Path(config.cache_dir)
    tokenizer = tokenizers.load_tokenizer(config.tokenizer)
    what = {"source": config.source, "tokenizer": tokenizers.identity(tokenizer), "format": FORMAT, **source.identity(cache_dir)}
    name = re.sub(r"[^A-Za-z0-9_.]+", "-", config.source)
    directory = cache_dir / f"{name}-{xxhash.xxh3_64_hexdigest(json.dumps(what, sort_keys=True).encode())}"
    made = False
    if not directory.exists():
        make_folder(cache_dir, "data.cache_dir")
        with _lock(cache_dir / f".{name}.lock"):
            if not directory.exists():
                _sweep(directory)
                _make(directory, source, tokenizer, what)
                made = True
    return TokenStore(directory, held_out_fraction=config.held_out_fraction, held_out=config.held_out), made


@contextlib.contextmanager
def _lock(path: pathlib.Path) -> Iterator[None]:
    try:
        file = open(path, "w")
    except OSError as error:
        raise UserError(f"data.cache_dir={str(path.parent)!r} cannot be written to: {error.strerror}") from error
    with file:
        # Some network file systems know no locks: then two hosts may do the same work, and the first rename wins.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sweep(directory: pathlib.Path) -> None:
    """Removes what killed preparations of this store left a day ago and longer; a younger one may be another host's at work."""
    for left in directory.parent.glob(f".{directory.name}.*"):
        newest = max((path.stat().st_mtime for path in [left, *left.iterdir()]), default=0.0)
        if time.time() - newest > 86_400:
            shutil.rmtree(left, ignore_errors=True)


def _make(directory: pathlib.Path, source: Source, tokenizer: tokenizers.Tokenizer, what: dict[str, Any]) -> None:
    if not source.holds_tokens and isinstance(tokenizer, tokenizers.Ids):
        raise UserError(f"data.tokenizer='ids' is for token files; data.source={what['source']!r} is text")
    vocab_size = source.vocab_size(tokenizer) if source.holds_tokens else tokenizer.vocab_size
    unfinished = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}")
    unfinished.mkdir()
    try:
        with StoreWriter(unfinished, tokenizer, vocab_size, what) as writer:
            for document in source.documents(directory.parent):
                if source.holds_tokens:
                    writer.add(document)
                elif not isinstance(document, str):
                    kind = type(document).__name__
                    raise UserError(f"data.source={what['source']!r}: a document is {kind}, not text; choose another text_key")
                else:
                    writer.add(tokenizer.encode(document), text=document.encode("utf-8"))
        try:
            os.rename(unfinished, directory)
        except OSError:
            if not directory.exists():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _options(config_class: type, assignments: list[str], source: str) -> Any:
    """`key=value` strings -> a `Config`, values read as the type of the field's default."""
    defaults = config_fields(config_class)
    values = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(f"--option {assignment!r} must be written key=value")
        if key not in defaults:
            raise (
                unknown(f"--option of {source}", key, defaults)
                if defaults
                else UserError(f"data.source={source!r} has no options, not {key!r}")
            )
        wanted = type(defaults[key])
        try:
            value = text if wanted is str else ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        value = float(value) if wanted is float and type(value) is int else value
        if type(value) is not wanted:
            raise UserError(f"--option {key}={text} must be of type {wanted.__name__}")
        values[key] = value
    return config_class(**values)


def run(argv: list[str]) -> None:
    """The command."""
    defaults = config_fields(DataConfig)
    parser = command.Parser(prog="python -m lcx.data.prepare", description="Prepares a token store.", allow_abbrev=False)
    for name, text in {
        "source": "stdlib_text, text_folder, token_file, tfds:<name>, hf:<name>",
        "tokenizer": "bytes, ids, the path of a tokenizer.json or of a SentencePiece .model",
        "cache_dir": "where stores are kept",
    }.items():
        parser.add_argument(f"--{name}", default=defaults[name], help=f"{text} (default: {defaults[name]})")
    parser.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="an option of the source; may be repeated"
    )
    arguments = parser.parse_args(argv)
    config = DataConfig(source=arguments.source, tokenizer=arguments.tokenizer, cache_dir=arguments.cache_dir)
    source_config = _options(load_source(config.source)[0].Config, arguments.option, config.source)

    begin = time.perf_counter()
    store, made = _open_or_make(config, _source(config, source_config))
    if not made:
        store.verify()
    _report(store, "prepared" if made else "was there; every block verified", time.perf_counter() - begin)


def _report(store: TokenStore, state: str, seconds: float) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    disk = sum(path.stat().st_size for path in store.directory.iterdir())
    for name, value in {
        "store": state,
        "where": str(store.directory),
        "documents": f"{store.num_documents:,}",
        "tokens": f"{store.num_tokens:,}",
        "vocabulary": f"{store.vocab_size:,} ({store.meta['tokenizer'].split('-')[0]})",
        "text": f"{store.meta['text_bytes']:,} bytes",
        "on disk": f"{disk:,} bytes, {store.meta['dtype']}",
        "seconds": f"{seconds:.1f}",
    }.items():
        table.add_row(f"[bold]{name}[/]", value)
    Console(soft_wrap=True, highlight=False).print(table)


if __name__ == "__main__":
    command.main(run)
