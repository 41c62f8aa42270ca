"""What the tests of data, its sources and its cache share."""

import numpy as np

from moejax import data


def documents_of(stream):
    """The documents of a stream of bytes."""
    ends = [*stream.starts[1:], len(stream.tokens) - 1]
    return [bytes(stream.tokens[a + 1 : b].astype(np.uint8)) for a, b in zip(stream.starts, ends, strict=False)]


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


def documents_of_ids(stream, tokenizer):
    ends = [*stream.starts[1:], len(stream.tokens) - 1]
    return [tokenizer.decode(stream.tokens[a + 1 : b]).encode() for a, b in zip(stream.starts, ends, strict=True)]
