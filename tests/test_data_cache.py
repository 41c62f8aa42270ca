"""The cache: whole or absent, built once, true to its files; the held-out split."""

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from data_helpers import all_documents, documents_of, prepare, write_folder

from moejax import data_cache, tokenizers
from moejax.errors import UserError


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


def test_held_out_tails_take_their_share_of_the_bytes_that_tokens_do_not_tell(tmp_path):
    """A document of ten tokens of one byte each, in truth 40 bytes: 30 more, of which eight tokens take 24."""
    bytes_tokenizer = tokenizers.load("bytes")
    end = bytes_tokenizer.end_of_document
    for split, tokens in (("train", [end, *range(65, 75), end, 65]), ("heldout", [])):
        writer = data_cache._Writer(str(tmp_path), split, "uint16", end)
        starts = np.array([0, 11][: 2 * bool(tokens)], np.int64)
        writer.write(data_cache.Stream(np.array(tokens, np.int32), starts, np.array([30, 7], np.int32)[: len(starts)]))
        writer.close()
    data_cache._hold_out_tails(str(tmp_path), "uint16", bytes_tokenizer, 0.2)
    train, held = (data_cache._open_stream(str(tmp_path), split, "uint16") for split in ("train", "heldout"))
    assert (train.extra_bytes.tolist(), held.extra_bytes.tolist()) == ([24], [6, 7])
    assert held.tokens.tolist() == [end, 73, 74, end, 65, end]


def test_cache_folder_default(monkeypatch):
    monkeypatch.setenv("MOEJAX_CACHE", "/somewhere")
    assert data_cache.default_folder() == "/somewhere"
    monkeypatch.delenv("MOEJAX_CACHE")
    assert data_cache.default_folder() == os.path.expanduser("~/.cache/moejax")
