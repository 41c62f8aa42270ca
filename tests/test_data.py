"""Data: the order is a function of (seed, step), packing loses and mixes nothing, the cache is whole or absent."""

import dataclasses
import json
import os
import platform
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import grain
import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from array_record.python import array_record_module
from hypothesis import given, settings

from moejax import data, data_cache, sources, tokenizers
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


def documents_of(stream):
    """The documents of a stream of bytes."""
    ends = [*stream.starts[1:], len(stream.tokens) - 1]
    return [bytes(stream.tokens[a + 1 : b].astype(np.uint8)) for a, b in zip(stream.starts, ends, strict=False)]


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


# Sources.


def write_folder(folder, count=40):
    folder.mkdir(exist_ok=True)
    for i in range(count):
        (folder / f"{i:03}.txt").write_bytes(f"document {i}\n".encode() * (5 + i))
    return [path.read_bytes() for path in sorted(folder.glob("*.txt"))]


def prepare(tmp_path, source, **config):
    config = {"source": source, "cache_dir": str(tmp_path / "cache"), "sequence_length": 32, **config}
    return data.prepare(data.DataConfig(**config), progress=False)


def all_documents(corpus):
    return sorted(d for stream in corpus.train + corpus.heldout for d in documents_of(stream))


def test_every_kind_of_source_reads_the_same_text(tmp_path):
    documents = write_folder(tmp_path / "text")
    with open(tmp_path / "a.jsonl", "w") as file:
        file.writelines(json.dumps({"body": d.decode(), "n": 1}) + "\n\n" for d in documents)
    table = pa.table({"text": [*(d.decode() for d in documents), None]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    writer = array_record_module.ArrayRecordWriter(str(tmp_path / "a.array_record"), "group_size:1")
    for document in documents:
        writer.write(document)
    writer.close()
    names = ["text:{}/text/**", "jsonl:{}/*.jsonl#body", "parquet:{}/a.parquet", "array_record:{}/*.array_record"]
    corpora = [prepare(tmp_path, name.format(tmp_path), eval_fraction=0.3) for name in names]
    for corpus in corpora:
        assert all_documents(corpus) == sorted(documents)
        assert corpus.content_hash == corpora[0].content_hash
        assert corpus.bytes_per_token == sum(map(len, documents)) / (sum(map(len, documents)) + len(documents))
        assert_same(corpus.batch(3, 1), corpora[0].batch(3, 1))


def test_progress_sizes_sum_to_the_files(tmp_path, monkeypatch):
    write_folder(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "ab"}\n' * 50)
    pyarrow.parquet.write_table(pa.table({"text": ["a"] * 5000}), tmp_path / "a.parquet")
    monkeypatch.setattr(sources, "_CHUNK_BYTES", 100)
    for spec in ("text:{}/*.txt", "jsonl:{}/*.jsonl", "parquet:{}/*.parquet"):
        source = sources.parse_source(spec.format(tmp_path))
        files = sources.manifest(source)
        assert sum(share for _, share in sources.read(source, files)) == sum(file.size for file in files)


def test_python_stdlib():
    source = sources.parse_source("python-stdlib")
    files = sources.manifest(source)
    names = [file.path for file in files]
    assert names == sorted(names) and len(names) > 100
    assert any(name.endswith("argparse.py") for name in names)
    skipped = {"test", "tests", "site-packages"}
    root = os.path.commonpath(names)
    assert not any(skipped & set(os.path.relpath(name, root).split(os.sep)) for name in names)
    assert platform.python_version() in sources.describe(source)


def test_invalid_utf8_is_kept(tmp_path):
    documents = [b"caf\xe9 \xff\xfe\x00" * 20, b"\xc3" * 50, b"plain " * 20]
    for i, document in enumerate(documents):
        (tmp_path / f"{i}.txt").write_bytes(document)
    assert all_documents(prepare(tmp_path, f"text:{tmp_path}/*.txt", eval_fraction=0)) == sorted(documents)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "' + b"caf\xe9 \xff" * 20 + b'"}\n{"text": "half \\ud83d pair"}\n')
    corpus = prepare(tmp_path, f"jsonl:{tmp_path}/a.jsonl", eval_fraction=0)
    assert all_documents(corpus) == [b"caf\xe9 \xff" * 20, b"half \xed\xa0\xbd pair"]


def test_held_out_documents_are_in_no_training_window(tmp_path):
    documents = write_folder(tmp_path / "text")
    (tmp_path / "text" / "copies.txt").mkdir()  # A folder among the files is no file.
    (tmp_path / "copies").mkdir()
    for i, document in enumerate(documents):
        (tmp_path / "copies" / f"{i}.txt").write_bytes(document)
    for fraction in (0.1, 0.3):
        corpus = prepare(tmp_path, f"text:{tmp_path}/*/*.txt", eval_fraction=fraction)
        train, held = (documents_of(streams[0]) for streams in (corpus.train, corpus.heldout))
        assert len(train) + len(held) == 2 * len(documents)
        assert not set(train) & set(held)  # Equal documents go the same way.
        assert 0 < len(held) < 2 * len(documents) * 2 * fraction
        assert f"{len(held)} held-out documents" in corpus.description


def test_one_long_document_holds_out_its_end(tmp_path):
    text = bytes(range(1, 251)) * 4
    (tmp_path / "one.txt").write_bytes(text)
    for fraction in (0.02, 0.1, 0.9):  # At 0.9 the document's hash may fall either way: the result is the same.
        corpus = prepare(tmp_path, f"text:{tmp_path}/one.txt", eval_fraction=fraction)
        cut = 1000 - round(1000 * fraction)
        assert documents_of(corpus.train[0]) == [text[:cut]]
        assert documents_of(corpus.heldout[0]) == [text[cut:]]
        assert "of each document held out" in corpus.description


def test_bpe_corpus_counts_bytes_exactly(tmp_path):
    documents = write_folder(tmp_path / "text")
    tokenizers.train_bpe(documents, 280, str(tmp_path / "bpe.json"), progress=False)
    corpus = prepare(tmp_path, f"text:{tmp_path}/text/*", tokenizer=str(tmp_path / "bpe.json"), eval_fraction=0.3)
    assert corpus.vocab_size == 280
    assert corpus.bytes_per_token > 2
    total = sum(batch["target_bytes"] for batch in data.eval_batches(corpus, corpus.config))
    decoded = [documents_of_ids(stream, corpus.tokenizer) for stream in corpus.train + corpus.heldout]
    assert sorted(decoded[0] + decoded[1]) == sorted(documents)
    assert total == sum(map(len, decoded[1]))


def documents_of_ids(stream, tokenizer):
    ends = [*stream.starts[1:], len(stream.tokens) - 1]
    return [tokenizer.decode(stream.tokens[a + 1 : b]).encode() for a, b in zip(stream.starts, ends, strict=True)]


def test_train_tokenizer_command(tmp_path):
    write_folder(tmp_path / "text")
    command = [sys.executable, "experiments/train_tokenizer.py", f"--source=text:{tmp_path}/text/*"]
    command += ["--vocab_size=270", f"--output={tmp_path}/new/bpe.json"]
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    done = subprocess.run(command, check=True, cwd=root, capture_output=True, text=True)
    assert "270 tokens" in done.stdout
    assert prepare(tmp_path, f"text:{tmp_path}/text/*", tokenizer=f"{tmp_path}/new/bpe.json").vocab_size == 270
    failed = subprocess.run([*command, "--vocab_size=3"], check=False, cwd=root, capture_output=True, text=True)
    assert failed.returncode == 2
    assert failed.stderr.strip().splitlines() == [
        "error: vocab_size 3 is too small: 256 bytes and <|endoftext|> make 257; give more"]


# The cache.


def count_builds(monkeypatch):
    builds = []
    build = data_cache._build
    monkeypatch.setattr(data_cache, "_build", lambda *args: (builds.append(args[0]), build(*args))[1])
    return builds


def test_cache_is_reused_and_follows_the_files(tmp_path, monkeypatch):
    write_folder(tmp_path / "text")
    builds = count_builds(monkeypatch)

    def built(**config):
        before = len(builds)
        corpus = prepare(tmp_path, f"text:{tmp_path}/text/*", **config)
        return corpus, len(builds) - before

    first, count = built()
    assert count == 1
    assert built()[1] == 0
    assert built(sequence_length=8, batch_size=2)[1] == 0  # Windows are cut when read.
    assert built(eval_fraction=0.3)[1] == 1
    changed = tmp_path / "text" / "003.txt"
    os.utime(changed, ns=(1, 1))
    touched, count = built()  # Another mtime: read again, the same text.
    assert count == 1 and touched.content_hash == first.content_hash
    status = changed.stat()
    changed.write_bytes(changed.read_bytes() + b"!")
    os.utime(changed, ns=(status.st_atime_ns, status.st_mtime_ns))
    grown, count = built()  # Another size under the old mtime.
    assert count == 1 and grown.content_hash != first.content_hash
    (tmp_path / "text" / "new.txt").write_bytes(b"new")
    assert built()[1] == 1


def test_source_that_changes_while_it_is_read(tmp_path, monkeypatch):
    write_folder(tmp_path / "text")
    build = data_cache._build
    monkeypatch.setattr(
        data_cache, "_build", lambda *args: (build(*args), (tmp_path / "text" / "000.txt").write_bytes(b"x"))[0])
    with pytest.raises(UserError, match="changed while it was being read"):
        prepare(tmp_path, f"text:{tmp_path}/text/*")
    assert not [name for name in os.listdir(tmp_path / "cache") if not name.endswith(".lock")]


def test_truncated_cache_is_built_again(tmp_path):
    documents = write_folder(tmp_path / "text")
    for name in ("train.tokens", "heldout.starts", "meta.json"):
        corpus = prepare(tmp_path, f"text:{tmp_path}/text/*", eval_fraction=0.3)
        (entry,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
        with open(entry / name, "r+b") as file:
            file.truncate(os.path.getsize(entry / name) // 2)
        again = prepare(tmp_path, f"text:{tmp_path}/text/*", eval_fraction=0.3)
        assert again.content_hash == corpus.content_hash
        assert all_documents(again) == sorted(documents)


def test_killed_build_is_not_taken_for_whole(tmp_path):
    documents = write_folder(tmp_path / "text")
    # Killed at the last moment: every file is written, the folder isn't yet renamed.
    script = (
        "import os, signal\nfrom moejax import data, data_cache\n"
        "data_cache.os.rename = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"data.prepare(data.DataConfig(source='text:{tmp_path}/text/*', cache_dir='{tmp_path}/cache'), progress=False)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    (left,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    assert (left / "meta.json").exists()
    (left / "train.tokens").write_bytes(b"half")  # As an earlier kill would leave it.
    assert all_documents(prepare(tmp_path, f"text:{tmp_path}/text/*")) == sorted(documents)
    assert not left.exists()


@pytest.mark.parametrize("with_lock", [True, False])
def test_two_builds_at_once(tmp_path, monkeypatch, with_lock):
    documents = write_folder(tmp_path / "text")
    builds = count_builds(monkeypatch)
    if not with_lock:  # A file system without locks: both build, the first rename wins.
        barrier = threading.Barrier(2, timeout=20)
        rename = os.rename

        def no_lock(*_):
            raise OSError("no locks here")

        def meet(*paths):
            barrier.wait()
            rename(*paths)

        monkeypatch.setattr(data_cache.fcntl, "flock", no_lock)
        monkeypatch.setattr(data_cache.os, "rename", meet)
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(prepare, tmp_path, f"text:{tmp_path}/text/*") for _ in range(2)]
        corpora = [future.result() for future in futures]
    assert len(builds) == (1 if with_lock else 2)
    for corpus in corpora:
        assert all_documents(corpus) == sorted(documents)
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1


# Mistakes.


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("text:{}/missing/*.txt", "no file matches"),
        ("text:{}/empty.txt", "holds no text"),
        ("text:{}/dangling.txt", "cannot read"),
        ("text:{}/short.txt", "fewer than one window of data.sequence_length=32"),
        ("jsonl:{}/a.jsonl", "line 1 of .* has no field 'text'; it has 'body', 'n'"),
        ("jsonl:{}/a.jsonl#n", "line 1 .* field 'n' is a int, not a string"),
        ("jsonl:{}/short.txt", "line 1 of .* is not JSON"),
        ("jsonl:{}/list.jsonl", "line 2 of .* is a list"),
        ("parquet:{}/a.parquet", "has no field 'text'; it has 'body', 'n'"),
        ("parquet:{}/a.parquet#n", "field 'n' is int64, not a string"),
        ("parquet:{}/short.txt", "is not a whole parquet file"),
        ("parquet:{}/cut.parquet#body", "is not a whole parquet file"),
        ("array_record:{}/short.txt", "is not a whole ArrayRecord file"),
        ("texts:{}/short.txt", "is not a source; give one of"),
        ("{}/short.txt", "is not a source; give one of"),
        ("text:", "is not a source; give one of"),
        ("0*python-stdlib", "the weight 0 is not above 0"),
        ("0.5*python-stdlib + -1*text:{}/short.txt", "the weight -1 is not above 0"),
        ("python-stdlib + 0.5*text:{}/short.txt", "'python-stdlib' has no weight"),
    ],
)
def test_bad_sources(tmp_path, source, message):
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "short.txt").write_bytes(b"short")
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "a.jsonl").write_text('{"body": "text", "n": 1}\n')
    (tmp_path / "list.jsonl").write_text('{"text": "a"}\n["b"]\n')
    pyarrow.parquet.write_table(pa.table({"body": ["text"] * 999, "n": [1] * 999}), tmp_path / "a.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:300])
    with pytest.raises(UserError, match=message) as error:
        prepare(tmp_path, source.format(tmp_path))
    assert "\n" not in str(error.value)


def test_unreadable_file(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(b"text")

    def refuse(path, *args, **kwargs):
        if str(path).endswith("a.txt"):
            raise PermissionError(13, "Permission denied", str(path))
        return open(path, *args, **kwargs)

    monkeypatch.setattr(sources, "open", refuse, raising=False)  # Permissions don't stop root, who may run this.
    with pytest.raises(UserError, match=r"cannot read .*a.txt \(Permission denied\)"):
        prepare(tmp_path, f"text:{tmp_path}/a.txt")


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


def test_unwritable_cache(tmp_path):
    write_folder(tmp_path / "text")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data.cache_dir: cannot write to .*free space or name another folder"):
        prepare(tmp_path, f"text:{tmp_path}/text/*", cache_dir=str(tmp_path / "file" / "cache"))


def test_full_disk_leaves_no_half_entry(tmp_path, monkeypatch):
    documents = write_folder(tmp_path / "text")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(data_cache._Writer, "write", full)
        with pytest.raises(UserError, match="No space left on device"):
            prepare(tmp_path, f"text:{tmp_path}/text/*")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert all_documents(prepare(tmp_path, f"text:{tmp_path}/text/*")) == sorted(documents)


def test_mistakes_at_reading():
    corpus = corpus_of([DOCUMENTS])
    with pytest.raises(UserError, match="batch_size=8 is not divisible by 3 processes"):
        data.train_iterator(corpus, corpus.config, 0, 0, 0, 3)
    with pytest.raises(UserError, match="eval_fraction is 0: nothing is held out"):
        data.eval_batches(corpus, corpus.config)
    with pytest.raises(UserError, match="seed is -1"):
        corpus.batch(0, -1)


def test_cache_folder_default(monkeypatch):
    monkeypatch.setenv("MOEJAX_CACHE", "/somewhere")
    assert data_cache.default_folder() == "/somewhere"
    monkeypatch.delenv("MOEJAX_CACHE")
    assert data_cache.default_folder() == os.path.expanduser("~/.cache/moejax")


def test_iterator_is_grains():
    corpus = corpus_of([DOCUMENTS])
    assert isinstance(data.train_iterator(corpus, corpus.config, 0), grain.DatasetIterator)
