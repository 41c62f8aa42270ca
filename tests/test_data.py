"""Data: the order is a function of (seed, step), packing loses and mixes nothing."""

import dataclasses

import grain
import hypothesis.strategies as st
import numpy as np
import pytest
from data_helpers import prepare, write_folder
from hypothesis import given, settings

from moejax import data, data_cache, tokenizers
from moejax.errors import UserError

END = tokenizers.ByteTokenizer.end_of_document
ARRAYS = ("tokens", "targets", "positions", "segment_ids", "mask")


def stream_of(documents):
    """A stream of byte documents, in memory: E d1 E d2 … E dn E."""
    tokens = [END]
    starts = []
    for document in documents:
        starts.append(len(tokens) - 1)
        tokens += [*document, END]
    extra = np.zeros(len(documents), np.int32)
    return data_cache.Stream(np.array(tokens, np.uint16), np.array(starts, np.int64), extra)


def corpus_of(train, heldout=(), weights=(1.0,), **config):
    """A corpus in memory: one stream for each list of documents in `train`."""
    config = data.DataConfig(**{"sequence_length": 8, "batch_size": 8, **config})
    held = (stream_of(heldout),) if heldout else ()
    streams = tuple(map(stream_of, train))
    return data.Corpus(config, tokenizers.ByteTokenizer(), weights, streams, held, "", "", 1.0)


def assert_same(one, other):
    assert one.keys() == other.keys() == {*ARRAYS, "target_bytes"}
    for name in ARRAYS:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)
    assert one["target_bytes"] == other["target_bytes"]


def concatenated(parts):
    batch = {name: np.concatenate([part[name] for part in parts]) for name in ARRAYS}
    return {**batch, "target_bytes": sum(part["target_bytes"] for part in parts)}


DOCUMENTS = [bytes([i]) * (3 + i % 7) for i in range(60)]
SHORT = st.lists(st.binary(min_size=1, max_size=30), min_size=1, max_size=12)


# Packing.


def test_packing_by_hand():
    # The stream is E a b c E d E; L = 4 cuts its 6 targets a b c E | d E and two of padding.
    a, b, c, d = b"abcd"
    got = data._pack([(stream_of([b"abc", b"d"]), 0), (stream_of([b"abc", b"d"]), 1)], 4, tokenizers.ByteTokenizer())
    np.testing.assert_array_equal(got["tokens"], [[END, a, b, c], [END, d, END, END]])
    np.testing.assert_array_equal(got["targets"], [[a, b, c, END], [d, END, END, END]])
    np.testing.assert_array_equal(got["segment_ids"], [[1, 1, 1, 1], [1, 1, 0, 0]])
    np.testing.assert_array_equal(got["positions"], [[0, 1, 2, 3], [0, 1, 0, 0]])
    np.testing.assert_array_equal(got["mask"], [[1, 1, 1, 1], [1, 1, 0, 0]])
    assert got["target_bytes"] == 4
    # L = 3: a b c | E d E. The second window begins inside the first document: its own segment, positions from 0.
    got = data._pack([(stream_of([b"abc", b"d"]), 1)], 3, tokenizers.ByteTokenizer())
    np.testing.assert_array_equal(got["tokens"], [[c, END, d]])
    np.testing.assert_array_equal(got["targets"], [[END, d, END]])
    np.testing.assert_array_equal(got["segment_ids"], [[1, 2, 2]])
    np.testing.assert_array_equal(got["positions"], [[0, 0, 1]])
    assert got["target_bytes"] == 1
    assert {name: got[name].dtype for name in ARRAYS} == dict.fromkeys(ARRAYS[:4], np.int32) | {"mask": np.bool_}


@settings(deadline=None, max_examples=60)
@given(SHORT, st.integers(1, 40))
def test_packing_properties(documents, L):
    stream = stream_of(documents)
    n = stream.num_windows(L)
    got = data._pack([(stream, window) for window in range(n)], L, tokenizers.ByteTokenizer())
    mask, segments, positions = got["mask"], got["segment_ids"], got["positions"]
    # Every byte of every document is a target once, in order, and so is the end of each document.
    targets = [token for document in documents for token in [*document, END]]
    np.testing.assert_array_equal(got["targets"][mask], targets)
    assert got["target_bytes"] == sum(map(len, documents))
    # The inputs that see one another (same row, same segment) are of one document: the one their targets are of.
    owner = np.repeat(np.arange(len(documents)), [len(document) + 1 for document in documents])
    rows = np.broadcast_to(np.arange(n)[:, None], (n, L))[mask]
    keys = {}
    for row, segment, document in zip(rows, segments[mask], owner, strict=True):
        assert keys.setdefault((row, segment), document) == document
    assert len({(row, document) for (row, _), document in keys.items()}) == len(keys)  # Nor is a document cut in two.
    # Padding is behind everything else, and only in the last window; positions count from 0 in each segment.
    assert mask[:-1].all()
    assert (np.diff(mask.astype(int), axis=1) <= 0).all()
    assert (segments[~mask] == 0).all() and (segments[mask] >= 1).all()
    for row in range(n):
        for segment in np.unique(segments[row][mask[row]]):
            inside = positions[row][segments[row] == segment]
            np.testing.assert_array_equal(inside, np.arange(len(inside)))


def test_target_bytes_of_a_tokenizer_that_alters_text():
    class Halving(tokenizers.ByteTokenizer):  # Pretends that every token stands for two bytes.
        byte_lengths = np.array([2] * 256 + [0], np.int32)

    stream = dataclasses.replace(stream_of([b"abc", b"de"]), extra_bytes=np.array([-1, 4], np.int32))
    whole = data._pack([(stream, 0)], 7, Halving())
    assert whole["target_bytes"] == 2 * 5 - 1 + 4
    # L = 3: a b c | E d e | E: each document's correction goes to the window with its first target.
    assert [data._pack([(stream, w)], 3, Halving())["target_bytes"] for w in range(3)] == [6 - 1, 4 + 4, 0]


# Order.


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("weights", [(1.0,), (0.7, 0.3)])
def test_same_batches_on_any_number_of_processes(processes, weights):
    corpus = corpus_of([DOCUMENTS, DOCUMENTS[::3]][: len(weights)], heldout=DOCUMENTS[:20], weights=weights)
    for step in (0, 3, 40):
        parts = [corpus.batch(step, 5, process, processes) for process in range(processes)]
        assert_same(concatenated(parts), corpus.batch(step, 5))
    iterators = [data.eval_batches(corpus, corpus.config, None, process, processes) for process in range(processes)]
    for parts, whole in zip(zip(*iterators, strict=True), data.eval_batches(corpus, corpus.config), strict=True):
        assert_same(concatenated(parts), whole)


def test_iterator_restarts_at_any_step_on_any_number_of_processes():
    corpus = corpus_of([DOCUMENTS])
    one = data.train_iterator(corpus, corpus.config, seed=3)
    whole = [next(one) for _ in range(30)]
    for start in (0, 1, 17):
        two = [data.train_iterator(corpus, corpus.config, 3, start, process, 2) for process in range(2)]
        for step in range(start, start + 6):
            assert_same(concatenated([next(part) for part in two]), whole[step])
            assert_same(corpus.batch(step, 3), whole[step])


def test_order_is_what_it_was():
    # Written down once: should a new grain or numpy permute otherwise, resumed runs would see other batches.
    corpus = corpus_of([[bytes([i]) for i in range(100)]], sequence_length=2, batch_size=6)
    assert corpus.batch(0, 0)["targets"][:, 0].tolist() == [87, 61, 50, 7, 70, 72]
    assert corpus.batch(1000, 7)["targets"][:, 0].tolist() == [31, 92, 30, 9, 63, 89]
    streams = [[bytes([i]) for i in range(100)], [bytes([100 + i]) for i in range(50)]]
    corpus = corpus_of(streams, weights=(0.7, 0.3), sequence_length=2, batch_size=6)
    assert corpus.batch(1000, 7)["targets"][:, 0].tolist() == [120, 89, 20, 111, 42, 78]


def test_epochs_are_different_permutations():
    corpus = corpus_of([[bytes([i]) for i in range(100)]], sequence_length=2, batch_size=10)

    def epoch(seed, number):  # Window w is (byte w, end): 100 windows, 10 batches an epoch.
        return [t for s in range(10) for t in corpus.batch(10 * number + s, seed)["targets"][:, 0].tolist()]

    orders = [tuple(epoch(seed, number)) for seed in (0, 1, 2) for number in (0, 1)]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert len(set(orders)) == len(orders)  # Among them: seed 1's first epoch is not seed 0's second.


def test_a_batch_may_span_epochs_and_be_larger_than_one():
    corpus = corpus_of([[b"a", b"b", b"c"]], sequence_length=2, batch_size=7)
    rows = [t for s in range(3) for t in corpus.batch(s, 0)["targets"][:, 0].tolist()]
    assert all(sorted(rows[i : i + 3]) == [*b"abc"] for i in range(0, 21, 3))


def test_mixture_shares_and_epochs():
    streams = [[bytes([i]) for i in range(50)], [bytes([100 + i]) for i in range(30)]]
    corpus = corpus_of(streams, weights=(0.7, 0.3), sequence_length=2, batch_size=10)
    rows = [t for s in range(200) for t in corpus.batch(s, 0)["targets"][:, 0].tolist()]
    for end in (10, 100, 1000, 2000):  # Evenly interleaved: the share is right at every moment.
        assert abs(sum(t < 100 for t in rows[:end]) - 0.7 * end) <= 1 + 0.005 * end
    second = [t - 100 for t in rows if t >= 100]
    assert all(sorted(second[i : i + 30]) == list(range(30)) for i in range(0, 570, 30))


def test_eval_covers_every_target_once_and_pads_the_rest():
    corpus = corpus_of([DOCUMENTS], heldout=DOCUMENTS, sequence_length=16, batch_size=8)
    batches = list(data.eval_batches(corpus, corpus.config))
    assert sum(batch["mask"].sum() for batch in batches) == corpus.heldout[0].num_targets
    assert sum(batch["target_bytes"] for batch in batches) == sum(map(len, DOCUMENTS))
    assert all(batch["tokens"].shape == (8, 16) for batch in batches)
    filler = -corpus.heldout_windows % 8
    assert filler and not batches[-1]["mask"][-filler:].any()
    for batch, again in zip(batches, data.eval_batches(corpus, corpus.config, max_batches=2), strict=False):
        assert_same(batch, again)
    assert len(list(data.eval_batches(corpus, corpus.config, max_batches=2))) == 2


# Mistakes.


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sequence_length": 0}, "data.sequence_length is 0"),
        ({"batch_size": 0}, "data.batch_size is 0"),
        ({"eval_fraction": 1.0}, "data.eval_fraction is 1.0"),
        ({"tokenizer": "missing.json"}, "data.tokenizer 'missing.json'"),
    ],
)
def test_bad_settings(tmp_path, config, message):
    write_folder(tmp_path / "text")
    with pytest.raises(UserError, match=message):
        prepare(tmp_path, f"text:{tmp_path}/text/*", **config)


def test_mistakes_at_reading():
    corpus = corpus_of([DOCUMENTS])
    with pytest.raises(UserError, match="batch_size=8 is not divisible by 3 processes"):
        data.train_iterator(corpus, corpus.config, 0, 0, 0, 3)
    with pytest.raises(UserError, match="eval_fraction is 0: nothing is held out"):
        data.eval_batches(corpus, corpus.config)
    with pytest.raises(UserError, match="seed is -1"):
        corpus.batch(0, -1)


def test_iterator_is_grains():
    corpus = corpus_of([DOCUMENTS])
    assert isinstance(data.train_iterator(corpus, corpus.config, 0), grain.DatasetIterator)
