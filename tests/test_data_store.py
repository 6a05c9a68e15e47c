"""Token store, splits and tokenizers: what goes in comes out, and damage is noticed."""

import json

import numpy as np
import pytest

from lcx.data import store as store_module
from lcx.data import tokenizers
from lcx.data.store import StoreWriter, TokenStore
from lcx.registry import UserError

TEXTS = ["", "first document\n", "zwei: äöü €", "x" * 700, "copy", "copy", "last"]


def write(directory, texts=TEXTS, tokenizer=None):
    directory.mkdir(parents=True)
    tokenizer = tokenizer or tokenizers.Bytes()
    with StoreWriter(directory, tokenizer, tokenizer.vocab_size, {"source": "test"}) as writer:
        for text in texts:
            writer.add(tokenizer.encode(text), text=text.encode())
    return directory


def test_documents_come_back(tmp_path):
    store = TokenStore(write(tmp_path / "s"))
    texts = [text for text in TEXTS if text]
    assert (store.num_documents, store.vocab_size) == (len(texts), 256)
    assert store.num_tokens == sum(len(text.encode()) for text in texts)
    assert [store.tokenizer.decode(store.read(a, b)) for a, b in zip(store.offsets[:-1], store.offsets[1:])] == texts


@pytest.mark.parametrize("vocab_size, dtype", [(256, np.uint8), (257, np.uint16), (65536, np.uint16), (65537, np.uint32)])
def test_smallest_dtype_holds_the_largest_id(tmp_path, vocab_size, dtype):
    tmp_path.joinpath("s").mkdir()
    with StoreWriter(tmp_path / "s", tokenizers.Ids(vocab_size), vocab_size, {}) as writer:
        writer.add(np.array([0, vocab_size - 1]))
        with pytest.raises(UserError, match=f"id {vocab_size}"):
            writer.add(np.array([1, vocab_size]))
        with pytest.raises(UserError, match="id -1"):
            writer.add(np.array([-1]))
    store = TokenStore(tmp_path / "s")
    assert store.read(0, 2).dtype == dtype and store.read(0, 2).tolist() == [0, vocab_size - 1]
    assert store.tokenizer.vocab_size == vocab_size


def _flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.npy", "hashes.npy", "blocks.npy"])
def test_a_flipped_bit_is_noticed_on_opening(tmp_path, name):
    directory = write(tmp_path / "s")
    TokenStore(directory)
    _flip(directory / name, -3)
    with pytest.raises(UserError, match=f"{directory}.*{name}.*checksum.*delete"):
        TokenStore(directory)


def test_damage_of_other_kinds_is_one_clear_line(tmp_path):
    def broken(name, damage):
        directory = write(tmp_path / name)
        damage(directory)
        with pytest.raises(UserError, match="cannot be used.*delete that directory") as caught:
            TokenStore(directory)
        assert "\n" not in str(caught.value)

    broken("truncated", lambda d: (d / "tokens.bin").write_bytes((d / "tokens.bin").read_bytes()[:-1]))
    broken("missing", lambda d: (d / "offsets.npy").unlink())
    broken("not_json", lambda d: (d / "store.json").write_text("{"))
    broken(
        "other_format",
        lambda d: (d / "store.json").write_text(json.dumps(json.loads((d / "store.json").read_text()) | {"format": 0})),
    )


def test_large_stores_are_sampled_on_opening_and_verified_whole_on_request(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "BLOCK_BYTES", 64)
    monkeypatch.setattr(store_module, "BLOCKS_CHECKED_ON_OPEN", 3)
    directory = write(tmp_path / "s", ["a" * 1000])
    _flip(directory / "tokens.bin", 3 * 64)  # opening looks at blocks 0, 7 and 15
    store = TokenStore(directory)
    with pytest.raises(UserError, match="MiB 3"):
        store.verify()
    _flip(directory / "tokens.bin", 7 * 64)
    with pytest.raises(UserError, match="MiB 7"):
        TokenStore(directory)


def _texts(split):
    ids = split.read(0, split.num_tokens)
    return [bytes(ids[a:b]).decode() for a, b in zip(split.offsets[:-1], split.offsets[1:])]


def test_splits_hold_whole_documents_once_and_copies_stay_together(tmp_path):
    texts = [f"{i}" * (1 + i % 7) for i in range(200)] * 2
    store = TokenStore(write(tmp_path / "s", texts), held_out_fraction=0.1)
    train, held_out = store.split("train"), store.split("held_out")
    assert sorted(_texts(train) + _texts(held_out)) == sorted(texts)
    assert not set(_texts(train)) & set(_texts(held_out))
    assert abs(held_out.num_tokens / store.num_tokens - 0.1) < 0.02
    # The texts decide, not where they stand.
    again = TokenStore(write(tmp_path / "t", texts[::-1]), held_out_fraction=0.1)
    assert set(_texts(again.split("held_out"))) == set(_texts(held_out))


def test_any_part_of_a_split_reads_as_cut_from_the_whole(tmp_path):
    store = TokenStore(write(tmp_path / "s", [f"<{i}>" * (i % 5 + 1) for i in range(50)]), held_out_fraction=0.3)
    split = store.split("train")
    whole = split.read(0, split.num_tokens)
    random = np.random.default_rng(0)
    for _ in range(200):
        a, b = np.sort(random.integers(split.num_tokens + 1, size=2))
        np.testing.assert_array_equal(split.read(a, b), whole[a:b])


def test_tail_split_cuts_inside_a_document(tmp_path):
    store = TokenStore(write(tmp_path / "s", ["abc", "0123456789"]), held_out_fraction=0.25, held_out="tail")
    assert _texts(store.split("train")) == ["abc", "012345"] and _texts(store.split("held_out")) == ["6789"]


def test_a_split_without_tokens_is_an_error(tmp_path):
    directory = write(tmp_path / "s", ["only one"])
    with pytest.raises(UserError, match="train split.*data.held_out='tail'"):
        TokenStore(directory).split("train")
    assert TokenStore(directory, held_out_fraction=0).split("train").num_tokens == 8
    with pytest.raises(UserError, match="nothing to evaluate"):
        TokenStore(directory, held_out_fraction=0).split("held_out")
    with pytest.raises(UserError, match="held_out"):
        TokenStore(directory).split("heldout")


def test_bytes_and_ids():
    text = "naïve €\x00\n"
    assert tokenizers.Bytes().decode(tokenizers.Bytes().encode(text)) == text
    assert tokenizers.Bytes().decode([0xE2, 0x82]) == "�"
    assert tokenizers.Ids().encode("3 1 70000").tolist() == [3, 1, 70000] and tokenizers.Ids().decode([3, 1]) == "3 1"
    with pytest.raises(UserError, match="decimal"):
        tokenizers.Ids().encode("three")


def _tokenizer_json(path):
    library = pytest.importorskip("tokenizers")
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["the cat and the hat and the rat"] * 9, trainer)
    tokenizer.save(str(path))


def _sentencepiece_model(path):
    library = pytest.importorskip("sentencepiece")
    with open(path, "wb") as file:
        library.SentencePieceTrainer.train(
            sentence_iterator=iter(["the cat and the hat and the rat"] * 9),
            model_writer=file,
            vocab_size=300,
            byte_fallback=True,
            hard_vocab_limit=False,
            minloglevel=2,
        )


@pytest.mark.parametrize("name, build", [("tokenizer.json", _tokenizer_json), ("tokenizer.model", _sentencepiece_model)])
def test_tokenizer_files_round_trip_and_travel_with_the_store(tmp_path, name, build):
    path = tmp_path / name
    build(path)
    tokenizer = tokenizers.load_tokenizer(str(path))
    text = "the cat and the hat and the €"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and len(ids) < len(text.encode()) and ids.max() < tokenizer.vocab_size
    directory = write(tmp_path / "s", [text], tokenizer)
    before = tokenizers.identity(tokenizer)
    path.unlink()
    store = TokenStore(directory)
    assert store.tokenizer.decode(store.read(0, store.num_tokens)) == text and store.vocab_size == tokenizer.vocab_size
    assert tokenizers.identity(store.tokenizer) == before
    _flip(directory / name, 20)
    with pytest.raises(UserError, match="checksum"):
        TokenStore(directory)


def test_wrong_tokenizers_are_one_clear_line(tmp_path, monkeypatch):
    for name in ("byte", str(tmp_path / "missing.json"), str(tmp_path)):
        with pytest.raises(UserError, match="valid: bytes, ids"):
            tokenizers.load_tokenizer(name)
    pytest.importorskip("tokenizers"), pytest.importorskip("sentencepiece")
    for name in ("bad.json", "bad.model"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(UserError, match="is not a"):
            tokenizers.load_tokenizer(str(tmp_path / name))
    for library, name in (("tokenizers", "bad.json"), ("sentencepiece", "bad.model")):
        monkeypatch.setitem(__import__("sys").modules, library, None)
        with pytest.raises(UserError, match=r"pip install 'lcx\[tokenizers\]'"):
            tokenizers.load_tokenizer(str(tmp_path / name))
