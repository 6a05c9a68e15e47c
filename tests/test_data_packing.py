"""Packing, against a description of a row that knows nothing of plans: every token names its document and its place in it."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcx.data.packing import make_plan
from lcx.data.rows import TextRows
from lcx.data.split import Split
from lcx.data.tokenizers import Ids

PACKINGS = ("concat", "best_fit", "none", "stream")
lengths = st.lists(st.integers(1, 23), min_size=1, max_size=25)


class NumberedTokens:
    """Stands in for a store: token t has id t + 1, so that 0 is never a token."""

    def __init__(self, total):
        self.vocab_size, self.tokenizer, self.checksum = total + 1, Ids(total + 1), ""
        self._ids = np.arange(1, total + 1)

    def read(self, start, stop):
        return self._ids[start:stop]


def rows_of(document_lengths, packing, sequence_length, causal=True, gaps=()):
    """TextRows over documents of these lengths; those whose index is in `gaps` belong to the other split."""
    ends = np.cumsum(document_lengths)
    keep = np.array([i not in gaps for i in range(len(document_lengths))])
    split = Split(NumberedTokens(int(ends[-1])), (ends - document_lengths)[keep], ends[keep])
    return TextRows(split, packing, sequence_length, causal)


def whole_rows(rows, sequence_length):
    return [rows.slice(r, 0, sequence_length) for r in range(rows.num_rows)]


def check_rows(rows, documents, packing, sequence_length):
    """documents: the ids of each. Every promise of `DataConfig.packing` and of the batch."""
    order = list(itertools.chain(*documents))
    following = dict(itertools.pairwise(order)) if packing == "stream" else {}
    place = {}
    for document in documents:
        following |= dict(itertools.pairwise(document))
        place |= {token: (document[0], i) for i, token in enumerate(document)}
    seen = []
    for row in rows:
        tokens, segments = row["tokens"], row["segments"]
        real = segments > 0
        count = int(real.sum())
        assert real[:count].all() and not row["weights"][count:].any()
        assert all(not row[name][count:].any() for name in row)
        seen += tokens[:count].tolist()
        for token, label, weight in zip(tokens[:count], row["labels"], row["weights"]):
            assert weight == (token in following) and label == following.get(token, 0)
        assert segments[0] == 1 and set(np.diff(segments[:count])) <= {0, 1}
        for segment in np.unique(segments[:count]):
            piece = tokens[segments == segment].tolist()
            np.testing.assert_array_equal(row["positions"][segments == segment], np.arange(len(piece)))
            if packing != "stream":
                document, first = place[piece[0]]
                assert [place[token] for token in piece] == [(document, first + i) for i in range(len(piece))]
        if packing in ("concat", "stream"):
            assert tokens[:count].tolist() == order[len(seen) - count : len(seen)]
            assert count == sequence_length or len(seen) == len(order)
        if packing in ("none", "stream"):
            assert segments.max() == 1
        if packing in ("none", "best_fit"):  # a document is cut only if it is longer than a row, and then every S tokens
            starts = tokens[:count][row["positions"][:count] == 0]
            assert all(place[start][1] % sequence_length == 0 for start in starts.tolist())
    assert sorted(seen) == sorted(order), "every token exactly once"


def documents_of(document_lengths, gaps=()):
    ends = np.cumsum(document_lengths)
    return [list(range(end - n + 1, end + 1)) for i, (n, end) in enumerate(zip(document_lengths, ends.tolist())) if i not in gaps]


@pytest.mark.parametrize("packing", PACKINGS)
@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(1, 16), st.sets(st.integers(0, 24)))
def test_every_token_once_with_its_own_label_position_and_segment(packing, document_lengths, sequence_length, gaps):
    if len(gaps) >= len(document_lengths) or set(range(len(document_lengths))) <= gaps:
        gaps = set()
    rows = rows_of(document_lengths, packing, sequence_length, gaps=gaps)
    check_rows(whole_rows(rows, sequence_length), documents_of(document_lengths, gaps), packing, sequence_length)
    assert sum(rows.row_tokens(r) for r in range(rows.num_rows)) == sum(map(len, documents_of(document_lengths, gaps)))


@pytest.mark.parametrize("packing", PACKINGS)
@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(1, 16), st.booleans(), st.data())
def test_a_slice_is_cut_from_the_row(packing, document_lengths, sequence_length, causal, data):
    rows = rows_of(document_lengths, packing, sequence_length, causal)
    row = data.draw(st.integers(0, rows.num_rows - 1))
    a = data.draw(st.integers(0, sequence_length - 1))
    b = data.draw(st.integers(a + 1, sequence_length))
    whole, part = rows.slice(row, 0, sequence_length), rows.slice(row, a, b)
    for name, values in part.items():
        np.testing.assert_array_equal(values, whole[name][a:b], err_msg=name)


@pytest.mark.parametrize("break_it", ["labels", "weights", "positions", "segments", "tokens"])
def test_the_check_notices_a_wrong_entry(break_it):
    document_lengths = [5, 3, 9]
    rows = whole_rows(rows_of(document_lengths, "concat", 6), 6)
    check_rows(rows, documents_of(document_lengths), "concat", 6)
    rows[1][break_it][2] += 1
    with pytest.raises((AssertionError, KeyError)):
        check_rows(rows, documents_of(document_lengths), "concat", 6)


def test_a_row_by_hand():
    row = rows_of([3, 4, 9], "concat", 8).slice(0, 0, 8)
    assert row["tokens"].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert row["labels"].tolist() == [2, 3, 0, 5, 6, 7, 0, 9]
    assert row["weights"].tolist() == [1, 1, 0, 1, 1, 1, 0, 1]
    assert row["positions"].tolist() == [0, 1, 2, 0, 1, 2, 3, 0]
    assert row["segments"].tolist() == [1, 1, 1, 2, 2, 2, 2, 3]
    assert {name: values.dtype.name for name, values in row.items()} == dict(
        tokens="int32", labels="int32", weights="float32", positions="int32", segments="int32"
    )


def test_labels_that_are_the_tokens():
    row = rows_of([3, 2], "concat", 8, causal=False).slice(0, 0, 8)
    assert row["labels"].tolist() == row["tokens"].tolist() == [1, 2, 3, 4, 5, 0, 0, 0]
    assert row["weights"].tolist() == [1, 1, 1, 1, 1, 0, 0, 0]


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(1, 16))
def test_best_fit_leaves_no_two_rows_that_fit_in_one(document_lengths, sequence_length):
    rows = rows_of(document_lengths, "best_fit", sequence_length)
    counts = sorted(rows.row_tokens(r) for r in range(rows.num_rows))
    assert len(counts) < 2 or counts[0] + counts[1] > sequence_length


def test_a_plan_of_a_billion_token_row_needs_offsets_only():
    offsets = np.array([0, 7, 3 * 10**9, 3 * 10**9 + 5])
    for packing in PACKINGS:
        plan = make_plan(packing, offsets, 2**30)
        assert sum(plan.row_tokens(r) for r in range(plan.num_rows)) == offsets[-1]
        last = plan.pieces(1, 2**30 - 4, 2**30)
        if packing != "none":
            assert (last.column + last.length)[-1] == 2**30 and len(last.start) == 1
