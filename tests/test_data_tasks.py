"""Synthetic tasks: an independent solver finds every answer, and only with the right context."""

import re

import numpy as np
import pytest

from lcx.data import DATASETS, build_source, load_source
from lcx.data.tasks import associative_recall, copy, induction, passkey, selective_copy
from lcx.registry import UserError

LENGTH = 256


def solve_copy(tokens, config):
    """Position -> the answer expected there."""
    separator = tokens.index(config.symbols)
    return {separator + 1 + i: symbol for i, symbol in enumerate(tokens[:separator])}


def solve_recall(tokens, config):
    known = dict(zip(tokens[0 : 2 * config.num_pairs : 2], tokens[1 : 2 * config.num_pairs : 2]))
    return {
        i + 1: known[token]
        for i, token in enumerate(tokens)
        if token in known and i >= 2 * config.num_pairs and i + 1 < len(tokens)
    }


def solve_passkey(tokens, config):
    text = bytes(tokens).decode()
    (digits,) = re.findall(r"gate: (\d+)\.", text)
    return {len(text) - len(digits) + i: ord(digit) for i, digit in enumerate(digits)}


def solve_induction(tokens, config):
    return {len(tokens) - 1: tokens[tokens.index(config.vocab - 1) + 1]}


def solve_selective_copy(tokens, config):
    separator = tokens.index(config.vocab - 1)
    return {separator + 1 + i: token for i, token in enumerate(token for token in tokens[:separator] if token)}


CASES = {
    "copy": (copy.Config(symbols=5, held_out_rows=20), solve_copy),
    "associative_recall": (associative_recall.Config(num_pairs=6, vocab=40, gap=50, held_out_rows=20), solve_recall),
    "passkey": (passkey.Config(held_out_rows=20), solve_passkey),
    "induction": (induction.Config(vocab=20, held_out_rows=20), solve_induction),
    "selective_copy": (selective_copy.Config(num_tokens=9, vocab=12, held_out_rows=20), solve_selective_copy),
}


def rows_of(name, split="train", length=LENGTH, seed=0, causal_labels=True, **changes):
    config = CASES[name][0]
    config = type(config)(**(config.__dict__ | changes))
    return build_source(name, config).rows(seed=seed, split=split, sequence_length=length, causal_labels=causal_labels)


def test_every_task_of_the_table_is_solved_here():
    assert {name for name in DATASETS if load_source(name if name not in ("tfds", "hf") else name + ":x")[0].generated} == set(
        CASES
    )


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("name", CASES)
def test_the_answers_are_right(name, split):
    config, solve = CASES[name]
    rows = rows_of(name, split)
    for number in range(20):
        row = rows.slice(number, 0, LENGTH)
        assert row["tokens"].max() < rows.vocab_size and row["labels"].max() < rows.vocab_size
        np.testing.assert_array_equal(row["labels"][:-1], row["tokens"][1:])
        full = [*row["tokens"].tolist(), int(row["labels"][-1])]
        answers = solve(full, config)
        assert answers and np.flatnonzero(row["answers"]).tolist() == sorted(at - 1 for at in answers)
        assert all(full[at] == answer for at, answer in answers.items())
        np.testing.assert_array_equal(row["weights"], row["answers"])
        np.testing.assert_array_equal(row["positions"], np.arange(LENGTH))
        assert (row["segments"] == 1).all()
        # The twin: with the answer's source overwritten, the solver must disagree with the labels.
        source, first, last = source_of(name, config, full)
        broken = list(full)
        broken[source] = (broken[source] - first + 1) % (last - first + 1) + first
        assert any(broken[at] != answer for at, answer in solve(broken, config).items())


def source_of(name, config, tokens):
    """Where an answer comes from, and the first and last id that may stand there."""
    match name:
        case "copy":
            return 1, 0, config.symbols - 1
        case "associative_recall":
            return 1, 0, config.vocab - 1
        case "passkey":
            return bytes(tokens).decode().index("gate: ") + 6, ord("0"), ord("9")
        case "induction":
            return tokens.index(config.vocab - 1) + 1, 0, config.vocab - 2
        case "selective_copy":
            return next(at for at, token in enumerate(tokens) if token), 1, config.vocab - 2


@pytest.mark.parametrize("name", CASES)
def test_rows_are_functions_of_seed_split_and_number(name):
    rows = rows_of(name)

    def row(rows, number):
        return rows.slice(number, 0, LENGTH)["tokens"].tobytes()

    train = [row(rows, number) for number in range(50)]
    assert [row(rows_of(name), number) for number in reversed(range(50))] == train[::-1]
    assert len(set(train)) == 50 and row(rows_of(name, seed=1), 0) != train[0]
    held_out = [row(rows_of(name, "held_out"), number) for number in range(20)]
    assert not set(held_out) & set(train)
    part = rows.slice(7, 100, 200)
    for key, values in rows.slice(7, 0, LENGTH).items():
        np.testing.assert_array_equal(part[key], values[100:200], err_msg=key)


def test_splits_are_disjoint_even_where_rows_are_few():
    # 2^4 different rows, each drawn many times in both splits.
    train, held_out = (rows_of("copy", split, length=8, symbols=2) for split in ("train", "held_out"))
    rows = [{r.slice(number, 0, 8)["tokens"].tobytes() for number in range(100)} for r in (train, held_out)]
    assert rows[0] and rows[1] and not rows[0] & rows[1]
    with pytest.raises(UserError, match="too few different rows"):
        [rows_of("copy", split, length=2, symbols=2) for split in ("train", "held_out")]


@pytest.mark.parametrize("name", CASES)
def test_other_labels_and_losses(name):
    tokens = rows_of(name, causal_labels=False).slice(0, 0, LENGTH)
    np.testing.assert_array_equal(tokens["labels"], tokens["tokens"])
    solved = CASES[name][1](tokens["tokens"].tolist(), CASES[name][0])
    assert np.flatnonzero(tokens["answers"]).tolist() == sorted(solved)
    everything = rows_of(name, loss_on="all").slice(0, 0, LENGTH)
    assert (everything["weights"] == 1).all() and everything["answers"].any() and not everything["answers"].all()


def test_the_gap_is_kept():
    for gap in (0, 100, 200):
        row = rows_of("associative_recall", gap=gap).slice(0, 0, LENGTH)
        keys = row["tokens"][0:12:2].tolist()
        distances = [at - 2 * keys.index(row["tokens"][at]) for at in np.flatnonzero(row["answers"])]
        assert len(distances) == 6 and min(distances) >= max(gap, 2)


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_the_key_stands_at_its_depth(depth):
    for number in range(5):
        text = bytes(rows_of("passkey", length=2048, depth=depth).slice(number, 0, 2048)["tokens"].astype(np.uint8))
        assert abs(text.index(b"Note the key") / 2048 - depth) < 0.08
    found = [
        bytes(rows_of("passkey", length=2048).slice(n, 0, 2048)["tokens"].astype(np.uint8)).index(b"Note") for n in range(40)
    ]
    assert min(found) < 400 and max(found) > 1500


@pytest.mark.parametrize("distance,median", [("uniform", 128), ("log", 23), ("longest", 255)])
def test_the_special_token_stands_at_its_distance(distance, median):
    """Of rows of 257 tokens; the median of a log-uniform distance from 2 to 255 is the root of their product."""
    found, rows = [], rows_of("induction", distance=distance)
    for number in range(1000):
        row = rows.slice(number, 0, LENGTH)
        at, question = np.flatnonzero(row["tokens"] == 19)
        assert question == LENGTH - 1 and row["labels"][-1] == row["tokens"][at + 1]
        found.append(int(question - at))
    assert min(found) >= 2 and max(found) <= 255 and abs(np.log2(np.median(found) / median)) < 0.3
    if distance != "longest":
        assert min(found) < 5 and max(found) > 250


def test_what_to_copy_stands_anywhere():
    """400 rows of 9 tokens at 247 places: a place that could hold one and never does has a probability of 1e-6."""
    hits = sum(rows_of("selective_copy").slice(number, 0, LENGTH)["tokens"][:247] > 0 for number in range(400))
    assert hits.sum() == 400 * 9 and hits.min() > 0


@pytest.mark.parametrize("name", ["induction", "selective_copy"])
def test_a_row_of_a_million_tokens(name):
    length = 2**20
    row = rows_of(name, length=length).slice(3, length - 512, length)
    assert len(row["tokens"]) == 512 and row["answers"][-1] and row["positions"][-1] == length - 1


@pytest.mark.parametrize("name,least", [("induction", 4), ("selective_copy", 19)])
def test_the_shortest_row(name, least):
    config, solve = CASES[name]
    row = rows_of(name, length=least, causal_labels=False).slice(0, 0, least)
    assert np.flatnonzero(row["answers"]).tolist() == sorted(solve(row["tokens"].tolist(), config))
    with pytest.raises(UserError, match=f"rows of at least {least} tokens, not {least - 1}"):
        rows_of(name, length=least - 1, causal_labels=False)


def test_user_mistakes():
    for name, changes, match in [
        ("copy", dict(symbols=1), "datasets.copy.symbols=1"),
        ("copy", dict(loss_on="answer"), "did you mean 'answers'"),
        ("copy", dict(held_out_rows=0), "held_out_rows=0"),
        ("copy", dict(length=1), "at least 3 tokens"),
        ("associative_recall", dict(num_pairs=20), "datasets.associative_recall.vocab=40 has 19"),
        ("associative_recall", dict(gap=250), "at least 272 tokens"),
        ("associative_recall", dict(gap=-1), "gap=-1"),
        ("passkey", dict(depth=1.5), "datasets.passkey.depth=1.5"),
        ("passkey", dict(key_length=0), "key_length=0"),
        ("passkey", dict(length=40), "data.source='passkey' needs rows of at least"),
        ("induction", dict(vocab=2), "datasets.induction.vocab=2"),
        ("induction", dict(distance="far"), "datasets.induction.distance='far' is not known"),
        ("selective_copy", dict(num_tokens=0), "datasets.selective_copy.num_tokens=0"),
        ("selective_copy", dict(vocab=3), "datasets.selective_copy.vocab=3"),
        ("selective_copy", dict(loss_on="none"), "loss_on='none'"),
    ]:
        with pytest.raises(UserError, match=match):
            rows_of(name, **changes)
