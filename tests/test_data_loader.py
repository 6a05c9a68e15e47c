"""The loader: epochs, order, resumption, meshes, and what it reads."""

import json
import pathlib

import jax
import numpy as np
import pytest

from lcx.data.config import DataConfig
from lcx.data.loader import BATCH_SPEC, make_loader
from lcx.data.sources import text_folder
from lcx.data.store import TokenStore
from lcx.data.tasks import associative_recall
from lcx.registry import UserError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """(DataConfig fields, source config) of a folder of 60 documents."""
    root = tmp_path_factory.mktemp("corpus")
    random = np.random.default_rng(0)
    (root / "texts").mkdir()
    for i in range(60):
        (root / "texts" / f"{i:03}.txt").write_bytes(bytes(random.integers(97, 123, size=random.integers(1, 90), dtype=np.uint8)))
    return dict(source="text_folder", cache_dir=str(root / "cache")), text_folder.Config(path=str(root / "texts"))


def loader_of(corpus, mesh, *, split="train", batch=4, sequence_length=16, causal_labels=True, **options):
    fields, source_config = corpus
    config = DataConfig(**(dict(held_out_fraction=0.2) | fields | options))
    return make_loader(
        config, source_config, split=split, mesh=mesh, batch=batch, sequence_length=sequence_length, causal_labels=causal_labels
    )


def as_numpy(batch):
    return {name: np.asarray(value) for name, value in batch.items()}


def assert_same(batch, other):
    assert batch.keys() == other.keys()
    for name in batch:
        np.testing.assert_array_equal(np.asarray(batch[name]), np.asarray(other[name]), err_msg=name)


def pieces_of(batch):
    """The (tokens, labels, weights) of every piece of a batch."""
    found = []
    for tokens, labels, weights, segments in zip(*(batch[f"{n}_BS"] for n in ("tokens", "labels", "weights", "segments"))):
        for segment in range(1, segments.max() + 1):
            at = segments == segment
            found.append((bytes(tokens[at].astype(np.uint8)), labels[at].tobytes(), weights[at].tobytes()))
    return found


def test_a_batch_lies_on_the_mesh(corpus, mesh_of):
    mesh = mesh_of(data=2, fsdp=1, seq=2, tensor=2)
    with jax.transfer_guard("disallow"):  # as in the train step
        batch = next(loader_of(corpus, mesh))
    assert set(batch) == {"tokens_BS", "labels_BS", "weights_BS", "positions_BS", "segments_BS"}
    for name, value in batch.items():
        assert value.shape == (4, 16) and value.sharding == jax.NamedSharding(mesh, BATCH_SPEC)
        assert value.dtype == (np.float32 if name == "weights_BS" else np.int32)
        assert {shard.data.shape for shard in value.addressable_shards} == {(2, 8)}


@pytest.mark.parametrize("packing", ["concat", "best_fit", "none", "stream"])
def test_epochs_hold_every_piece_once_in_a_new_order(corpus, mesh_of, packing):
    loader = loader_of(corpus, mesh_of(seq=2), packing=packing)
    epochs = [[as_numpy(next(loader)) for _ in range(loader.batches_per_epoch)] for _ in range(3)]
    assert loader.epoch == 3
    pieces = [[piece for batch in epoch for piece in pieces_of(batch)] for epoch in epochs]
    assert sorted(pieces[0]) == sorted(pieces[1]) == sorted(pieces[2])
    assert pieces[0] != pieces[1] != pieces[2] != pieces[0]
    split = TokenStore(_stores(corpus)[0], held_out_fraction=0.2).split("train")
    real = sum(int((batch["segments_BS"] > 0).sum()) for epoch in epochs for batch in epoch)
    assert real == 3 * split.num_tokens == loader.tokens_seen


def _stores(corpus):
    return [path.parent for path in pathlib.Path(corpus[0]["cache_dir"]).glob("*/store.json")]


def test_without_shuffle_rows_come_in_order(corpus, mesh_of):
    loader = loader_of(corpus, mesh_of(), shuffle=False, packing="stream")
    split = TokenStore(_stores(corpus)[0], held_out_fraction=0.2).split("train")
    batches = [as_numpy(next(loader)) for _ in range(loader.batches_per_epoch)]
    tokens = np.concatenate([batch["tokens_BS"][batch["segments_BS"] > 0] for batch in batches])
    np.testing.assert_array_equal(tokens, split.read(0, split.num_tokens))
    assert (batches[-1]["segments_BS"] == 0).any(), "the last batch is filled up, not dropped"
    assert_same(next(loader), batches[0])


def test_held_out_is_one_epoch_in_order_and_shares_nothing_with_train(corpus, mesh_of):
    held_out = loader_of(corpus, mesh_of(), split="held_out", packing="none", sequence_length=96)
    first = [as_numpy(batch) for batch in held_out]
    assert len(first) == held_out.batches_per_epoch and held_out.epoch == 1
    assert next(held_out, None) is None
    held_out.reset()
    for batch, again in zip(first, held_out, strict=True):
        assert_same(batch, again)
    train = loader_of(corpus, mesh_of(), packing="none", sequence_length=96)
    trained = {piece[0] for _ in range(train.batches_per_epoch) for piece in pieces_of(as_numpy(next(train)))}
    assert not trained & {piece[0] for batch in first for piece in pieces_of(batch)}


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_resumption_is_exact_on_another_mesh(corpus, mesh_of, packing):
    loader = loader_of(corpus, mesh_of(), packing=packing)
    count = loader.batches_per_epoch + 3
    batches, states = [], [loader.state()]
    for _ in range(count):
        batches.append(as_numpy(next(loader)))
        states.append(loader.state())
    random = np.random.default_rng(1)
    for at in [0, *random.choice(np.arange(1, count), 4, replace=False).tolist()]:
        state = json.loads(json.dumps(states[at]))
        assert len(json.dumps(state)) < 1000
        resumed = loader_of(corpus, mesh_of(fsdp=2, seq=4), packing=packing)
        next(resumed)  # an iterator that has moved on is brought back too
        resumed.restore(state)
        assert resumed.state() == states[at]
        assert_same(next(resumed), batches[at])
        assert resumed.state() == states[at + 1]
    with pytest.raises(AssertionError):
        assert_same(batches[1], batches[2])


@pytest.mark.parametrize(
    "change", [dict(batch=2), dict(sequence_length=8), dict(seed=1), dict(packing="none"), dict(held_out="tail")]
)
def test_a_state_of_other_data_is_refused(corpus, mesh_of, change):
    state = loader_of(corpus, mesh_of()).state()
    with pytest.raises(UserError, match=f"cannot be resumed: {next(iter(change))} was"):
        loader_of(corpus, mesh_of(), **change).restore(state)


def test_seeds_differ(corpus, mesh_of):
    with pytest.raises(AssertionError):
        assert_same(next(loader_of(corpus, mesh_of())), next(loader_of(corpus, mesh_of(), seed=1)))


@pytest.mark.parametrize("axes", [dict(seq=8), dict(data=2, seq=2, tensor=2), dict(data=2, fsdp=2, seq=2)])
def test_meshes_do_not_change_a_batch(corpus, mesh_of, axes):
    one, many = loader_of(corpus, mesh_of()), loader_of(corpus, mesh_of(**axes))
    for _ in range(3):
        assert_same(next(one), next(many))


def test_every_token_is_read_once_per_batch(corpus, mesh_of, monkeypatch):
    read = []
    original = TokenStore.read
    monkeypatch.setattr(TokenStore, "read", lambda self, a, b: read.append(b - a) or original(self, a, b))
    loader = loader_of(corpus, mesh_of(seq=4, tensor=2), packing="stream", batch=2, held_out="tail")
    read.clear()
    next(loader)
    assert sum(read) == 2 * 16 + 2 * 4  # and one more for the last label of each slice


def test_tasks_give_the_same_batch_and_answers(mesh_of):
    corpus = dict(source="associative_recall"), associative_recall.Config(num_pairs=2, vocab=16, held_out_rows=6)
    loader, other = loader_of(corpus, mesh_of()), loader_of(corpus, mesh_of(data=2, seq=4))
    for _ in range(3):
        batch, again = next(loader), next(other)
        assert_same(batch, again)
    assert batch["answers_BS"].dtype == bool and int(batch["answers_BS"].sum()) == 4 * 2
    assert loader.epoch == 0 and loader.batches_per_epoch == 0 and loader.tokens_seen == 3 * 64
    state = json.loads(json.dumps(loader.state()))
    after = as_numpy(next(loader))
    resumed = loader_of(corpus, mesh_of(fsdp=4))
    resumed.restore(state)
    assert_same(next(resumed), after)
    held_out = [as_numpy(batch) for batch in loader_of(corpus, mesh_of(), split="held_out")]
    assert len(held_out) == 2 and held_out[1]["segments_BS"].any(axis=1).tolist() == [True, True, False, False]
    assert not held_out[1]["answers_BS"][2:].any()


def test_user_mistakes(corpus, mesh_of):
    with pytest.raises(UserError, match="batch 3 must be a positive multiple of mesh data x fsdp = 2"):
        loader_of(corpus, mesh_of(data=2), batch=3)
    with pytest.raises(UserError, match="sequence length 17 must be a positive multiple of mesh seq = 2"):
        loader_of(corpus, mesh_of(seq=2), sequence_length=17)
    with pytest.raises(UserError, match="split='test'"):
        loader_of(corpus, mesh_of(), split="test")
    for field, value in dict(packing="bestfit", held_out="tails", held_out_fraction=1.0, seed=-1).items():
        with pytest.raises(UserError, match=f"data.{field}="):
            DataConfig(**{field: value})
