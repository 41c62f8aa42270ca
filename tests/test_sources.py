"""Sources: every kind reads the same text, no byte is lost, what can't be read is refused in one line."""

import json
import os
import platform
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from array_record.python import array_record_module
from data_helpers import all_documents, documents_of_ids, prepare, write_folder

from moejax import data, sources, tokenizers
from moejax.errors import UserError


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
        for name, rows in corpus.batch(3, 1).items():
            np.testing.assert_array_equal(rows, corpora[0].batch(3, 1)[name])


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


def test_train_tokenizer_command(tmp_path):
    write_folder(tmp_path / "text")
    command = [sys.executable, "experiments/train_tokenizer.py", f"--source=text:{tmp_path}/text/*"]
    command += ["--vocab_size=270", f"--output={tmp_path}/new/bpe.json"]
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    done = subprocess.run(command, check=True, cwd=root, capture_output=True, text=True)
    assert "270 tokens" in done.stdout and "was not reached" not in done.stderr
    assert prepare(tmp_path, f"text:{tmp_path}/text/*", tokenizer=f"{tmp_path}/new/bpe.json").vocab_size == 270
    many = subprocess.run([*command, "--vocab_size=99999"], check=True, cwd=root, capture_output=True, text=True)
    assert "warning: --vocab_size=99999 was not reached" in many.stderr
    failed = subprocess.run([*command, "--vocab_size=3"], check=False, cwd=root, capture_output=True, text=True)
    assert failed.returncode == 2
    assert failed.stderr.strip().splitlines() == [
        "error: vocab_size 3 is too small: 256 bytes and <|endoftext|> make 257; give more"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("text:{}/missing/*.txt", "no file matches"),
        ("jsonl:{}/", r"that is a folder; give a glob of its files, such as jsonl:.*/\*\*/\*.jsonl"),
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
        ("0.7*text:{}/short.txt + python-stdlib", "'python-stdlib' has no weight"),
        ("0.7*python-stdlib + 0.3 text:{}/short.txt", "'0.3 text:.*' has no weight"),
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
