"""One source, tokenised once: two memory-mapped streams of tokens on disk, one to train on and one held out.

A stream is E d1 E d2 … E dn E: E the end-of-document token, d a document's tokens. It has `num_targets` = its
length − 1 (input, target) pairs. An entry of the cache is a folder named by a hash of everything its content depends
on: path, size and mtime of the source's files, the tokenizer, the held-out share. So an entry is never stale, only
unused; a changed source gets a new one.

An entry is built in a temporary folder and renamed when whole; a build that died leaves nothing that could be taken
for one. Processes that want the same entry wait for the first to build it (a file lock; where the file system has
none, each builds its own and the first rename wins).
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import tqdm

from moejax import sources
from moejax.errors import UserError
from moejax.tokenizers import Tokenizer

_FORMAT = 1  # Raise it when the files below change their meaning.
_SPLITS = ("train", "heldout")


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
    """One split of one source.

    tokens: (n,) uint16 or uint32, memory-mapped; n = 0 for an empty split.
    starts: (documents,) int64, the place in `tokens` of the end-of-document token that opens each document.
    extra_bytes: (documents,) int32, what a document's UTF-8 bytes differ by from the sum of its tokens' byte_lengths:
        0 for bytes and byte-level BPE, and what makes bits per byte exact for tokenizers that normalise or drop text
        (but where a document's tail is held out, for which it is shared out by tokens).
    """

    tokens: np.ndarray
    starts: np.ndarray
    extra_bytes: np.ndarray

    @property
    def num_targets(self) -> int:
        return max(len(self.tokens) - 1, 0)

    def num_windows(self, sequence_length: int) -> int:
        """Windows of `sequence_length` targets that hold the whole stream; the last may be part padding."""
        return -(-self.num_targets // sequence_length)


@dataclasses.dataclass(frozen=True, eq=False)
class Entry:
    """A whole entry of the cache.

    `digest` is the SHA-256 of the documents' digests in order, so it depends on the text alone, not on paths or
    tokenizer. `tails_held_out`: see `open_or_build`.
    """

    train: Stream
    heldout: Stream
    digest: str
    num_files: int
    num_bytes: int
    tails_held_out: bool


def default_folder() -> str:
    """$MOEJAX_CACHE, or ~/.cache/moejax."""
    return os.environ.get("MOEJAX_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "moejax")


def is_held_out(document_digest: bytes, eval_fraction: float) -> bool:
    """Whether a document with this digest is held out: the same for equal documents, wherever they stand."""
    return int.from_bytes(document_digest[:8], "little") < eval_fraction * 2.0**64


def digest(document: bytes) -> bytes:
    """The digest of one document, 16 bytes."""
    return hashlib.blake2b(document, digest_size=16).digest()


def open_or_build(
    source: sources.Source, tokenizer: Tokenizer, eval_fraction: float, folder: str, progress: bool = True
) -> Entry:
    """The source's entry in the cache, built first if need be (in parallel, with a progress bar).

    About `eval_fraction` of the documents are held out, by document hash. Where that leaves a split empty, as for a
    source of one long document, the last `eval_fraction` of each document is held out instead.
    UserError for a source that cannot be read, holds no text or changes while it is read, and an unwritable folder.
    """
    files = sources.manifest(source)
    settings = {
        "format": _FORMAT,
        "source": str(source),
        "tokenizer": tokenizer.fingerprint,
        "eval_fraction": eval_fraction,
        "files": [dataclasses.astuple(file) for file in files],
    }
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:20]
    path = os.path.join(os.path.expanduser(folder), f"{source.kind}-{key}")
    entry = _open(path)
    if entry is not None:
        return entry
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with _lock(path + ".lock") as locked:
            entry = _open(path)  # Another process may have built it while this one waited.
            if entry is not None:
                return entry
            if locked:  # Then no one is at work here: what lies about is left from builds that died.
                for stale in [*glob.glob(glob.escape(path) + ".building-*"), path]:
                    shutil.rmtree(stale, ignore_errors=True)
            temporary = tempfile.mkdtemp(prefix=os.path.basename(path) + ".building-", dir=os.path.dirname(path))
            try:
                _build(source, files, tokenizer, eval_fraction, temporary, settings, progress)
                if sources.manifest(source) != files:
                    raise UserError(f"data.source {source} changed while it was being read; run the command again")
                # Should another process have been first, its folder is not empty, this fails, and theirs is opened.
                with contextlib.suppress(OSError):
                    os.rename(temporary, path)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise UserError(f"data.cache_dir: cannot write to {os.path.dirname(path)} ({error.strerror}); free space or "
                        "name another folder as data.cache_dir or $MOEJAX_CACHE") from None
    entry = _open(path)
    if entry is None:
        raise RuntimeError(f"the cache entry {path} is not whole right after it was built")
    return entry


@contextlib.contextmanager
def _lock(path: str) -> Iterator[bool]:
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            locked = True
        except OSError:
            locked = False
        yield locked


def _open(path: str) -> Entry | None:
    """The entry in this folder; None if there is none, or one whose files are not of the sizes it was built with."""
    try:
        with open(os.path.join(path, "meta.json"), encoding="utf-8") as file:
            meta = json.load(file)
        if any(os.path.getsize(os.path.join(path, name)) != size for name, size in meta["sizes"].items()):
            return None
    except (OSError, ValueError, KeyError):
        return None
    train, heldout = (_open_stream(path, split, meta["dtype"]) for split in _SPLITS)
    return Entry(train, heldout, meta["digest"], meta["num_files"], meta["num_bytes"], meta["tails_held_out"])


def _open_stream(path: str, split: str, dtype: str) -> Stream:
    def array(name: str, dtype: str) -> np.ndarray:
        file = os.path.join(path, f"{split}.{name}")
        if os.path.getsize(file) == 0:  # An empty file can't be mapped.
            return np.zeros(0, dtype)
        return np.memmap(file, dtype, "r")

    return Stream(array("tokens", dtype), array("starts", "int64"), array("extra_bytes", "int32"))


class _Writer:
    """Writes one split, a stream of documents at a time (without the end-of-document token that closes it)."""

    def __init__(self, folder: str, split: str, dtype: str, end_of_document: int):
        names = [os.path.join(folder, f"{split}.{name}") for name in ("tokens", "starts", "extra_bytes")]
        self.tokens, self.starts, self.extra_bytes = (open(name, "wb") for name in names)  # noqa: SIM115
        self.end = np.array([end_of_document], dtype)
        self.length = 0
        self.documents = 0

    def write(self, part: Stream) -> None:
        self.tokens.write(memoryview(np.ascontiguousarray(part.tokens, self.end.dtype)))
        self.starts.write(memoryview(part.starts + self.length))
        self.extra_bytes.write(memoryview(np.ascontiguousarray(part.extra_bytes)))
        self.length += len(part.tokens)
        self.documents += len(part.starts)

    def close(self) -> None:
        if self.length:
            self.tokens.write(memoryview(self.end))
        for file in (self.tokens, self.starts, self.extra_bytes):
            file.flush()
            os.fsync(file.fileno())
            file.close()


def _build(
    source: sources.Source,
    files: tuple[sources.SourceFile, ...],
    tokenizer: Tokenizer,
    eval_fraction: float,
    folder: str,
    settings: dict[str, Any],
    progress: bool,
) -> None:
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    writers = [_Writer(folder, split, dtype, tokenizer.end_of_document) for split in _SPLITS]
    content, num_bytes = hashlib.sha256(), 0
    size = sum(file.size for file in files)
    chunks = sources.read(source, files)
    try:
        with tqdm.tqdm(total=size, unit="B", unit_scale=True, desc=f"tokenising {source}", disable=not progress) as bar:
            for chunk, share in _encode_in_parallel(tokenizer, chunks, eval_fraction):
                for writer, part in zip(writers, chunk.parts, strict=True):
                    writer.write(part)
                content.update(chunk.digests)
                num_bytes += chunk.num_bytes
                bar.update(share)
    finally:
        for writer in writers:
            writer.close()
    documents = [writer.documents for writer in writers]
    if not any(documents):
        raise UserError(f"data.source {source} holds no text: all its {len(files)} files are empty; give more text")
    tails = eval_fraction > 0 and min(documents) == 0
    if tails:
        _hold_out_tails(folder, dtype, tokenizer, eval_fraction)
    names = sorted(os.listdir(folder))
    meta = {
        "dtype": dtype,
        "digest": content.hexdigest(),
        "num_files": len(files),
        "num_bytes": num_bytes,
        "tails_held_out": tails,
        "sizes": {name: os.path.getsize(os.path.join(folder, name)) for name in names},
        "settings": settings,
    }
    with open(os.path.join(folder, "meta.json"), "w", encoding="utf-8") as file:
        json.dump(meta, file)
        file.flush()
        os.fsync(file.fileno())


@dataclasses.dataclass(frozen=True, eq=False)
class _Chunk:
    """Some documents, tokenised: the part for each split, all digests one after another, and their bytes."""

    parts: list[Stream]
    digests: bytes
    num_bytes: int


def _encode_in_parallel(
    tokenizer: Tokenizer, chunks: Iterator[tuple[list[bytes], int]], eval_fraction: float
) -> Iterator[tuple[_Chunk, int]]:
    """Each chunk of documents, tokenised, in order, with the bytes of files it stands for.

    A few threads suffice: `tokenizers`, hashing and numpy release the GIL, and `tokenizers` splits a chunk over all
    cores by itself. It needs some 50 bytes of memory for each byte of a chunk, and chunks in flight are bounded.
    """
    workers = min(4, os.cpu_count() or 1)
    pending: collections.deque[tuple[concurrent.futures.Future[_Chunk], int]] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        try:
            for documents, share in chunks:
                pending.append((pool.submit(_encode, tokenizer, documents, eval_fraction), share))
                if len(pending) >= 2 * workers:
                    future, share = pending.popleft()
                    yield future.result(), share
            while pending:
                future, share = pending.popleft()
                yield future.result(), share
        finally:
            for future, _ in pending:
                future.cancel()


def _encode(tokenizer: Tokenizer, documents: list[bytes], eval_fraction: float) -> _Chunk:
    digests = [digest(document) for document in documents]
    encoded = tokenizer.encode_documents(documents)
    held = [is_held_out(document_digest, eval_fraction) for document_digest in digests]
    parts = []
    for split in (False, True):
        chosen = [i for i in range(len(documents)) if held[i] == split]
        sizes = [len(documents[i]) for i in chosen]
        parts.append(_part([encoded[i] for i in chosen], sizes, tokenizer))
    return _Chunk(parts, b"".join(digests), sum(map(len, documents)))


def _part(encoded: list[np.ndarray], sizes: list[int], tokenizer: Tokenizer) -> Stream:
    """E d1 E d2 … of tokenised documents and their sizes in bytes."""
    if not encoded:
        return Stream(np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.int32))
    end = np.array([tokenizer.end_of_document], np.int32)
    tokens = np.concatenate([array for document in encoded for array in (end, document)], dtype=np.int32)
    lengths = np.array([len(document) + 1 for document in encoded], np.int64)
    starts = np.cumsum(lengths) - lengths
    known = np.add.reduceat(tokenizer.byte_lengths[tokens], starts)
    return Stream(tokens, starts, (np.array(sizes) - known).astype(np.int32))


def _hold_out_tails(folder: str, dtype: str, tokenizer: Tokenizer, eval_fraction: float) -> None:
    """Splits each document of the one split that is not empty: its last tokens are held out."""
    streams = [_open_stream(folder, split, dtype) for split in _SPLITS]
    stream = max(streams, key=lambda stream: stream.num_targets)
    for split in _SPLITS:  # The open maps keep the old files' content.
        for name in ("tokens", "starts", "extra_bytes"):
            os.remove(os.path.join(folder, f"{split}.{name}"))
    train, heldout = (_Writer(folder, split, dtype, tokenizer.end_of_document) for split in _SPLITS)
    ends = [*stream.starts[1:].tolist(), len(stream.tokens) - 1]
    try:
        for start, end, extra_bytes in zip(stream.starts.tolist(), ends, stream.extra_bytes, strict=True):
            cut = end - max(1, round((end - start - 1) * eval_fraction))
            at = np.zeros(1, np.int64)
            # by their share of the tokens: which token the bytes are of isn't known
            first = np.rint(extra_bytes[None] * ((cut - start - 1) / max(end - start - 1, 1))).astype(np.int32)
            if cut > start + 1:
                train.write(Stream(stream.tokens[start:cut], at, first))
            tail = np.concatenate([stream.tokens[start : start + 1], stream.tokens[cut:end]])
            heldout.write(Stream(tail, at, extra_bytes[None] - first))
    finally:
        train.close()
        heldout.close()
