"""Where text comes from: a source is named by a string, lists its files and reads its documents as bytes.

    python-stdlib               the .py files of this interpreter's standard library, one document each
    text:GLOB                   text files, one document each
    jsonl:GLOB[#FIELD]          one JSON object a line; the document is its FIELD (default "text")
    parquet:GLOB[#FIELD]        one document a row, from the column FIELD (default "text")
    array_record:GLOB           one document a record, its bytes
    0.7*SOURCE + 0.3*SOURCE     a mixture: the share of the training windows that each source fills

Globs may use ** and are sorted. Documents are bytes, never decoded here, so invalid UTF-8 is kept.
"""

import dataclasses
import glob
import json
import os
import platform
import re
import sysconfig
from collections.abc import Iterator

from moejax.errors import UserError

KINDS = ("python-stdlib", "text", "jsonl", "parquet", "array_record")
FORMS = "python-stdlib, text:GLOB, jsonl:GLOB[#FIELD], parquet:GLOB[#FIELD], array_record:GLOB"
# Not the library itself: installed packages, and tests (as large as the rest, and odd: files of syntax errors).
_STDLIB_SKIPS = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
_CHUNK_BYTES = 2 << 20  # Documents are handed on in chunks of about this size: one unit of parallel work.


@dataclasses.dataclass(frozen=True)
class Source:
    """One parsed source: its kind, glob ("" for python-stdlib) and text field (jsonl and parquet)."""

    kind: str
    pattern: str = ""
    field: str = "text"

    def __str__(self) -> str:
        if self.kind == "python-stdlib":
            return self.kind
        return f"{self.kind}:{self.pattern}" + (f"#{self.field}" if self.kind in ("jsonl", "parquet") else "")


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """One line of a manifest: what decides whether a cache is still true to its source."""

    path: str
    size: int
    mtime_ns: int


def parse_source(spec: str) -> Source:
    """"text:data/*.txt" -> Source. UserError for an unknown kind or a missing glob."""
    spec = spec.strip()
    kind, _, pattern = spec.partition(":")
    if kind not in KINDS or (kind == "python-stdlib") != (pattern == ""):
        raise UserError(f"data.source {spec!r} is not a source; give one of {FORMS}, or a mixture '0.7*A + 0.3*B'")
    if kind in ("jsonl", "parquet"):
        pattern, _, field = pattern.partition("#")
        return Source(kind, pattern, field or "text")
    return Source(kind, pattern)


def parse_mixture(spec: str) -> tuple[tuple[float, Source], ...]:
    """"0.7*A + 0.3*B" -> ((0.7, A), (0.3, B)), weights as given; one bare source -> ((1.0, source),).

    The parts are separated by " + " before a weight or a kind of source, so a glob may hold "*" and "+".
    UserError for a weight that is not above 0, or a part of several without one.
    """
    number = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
    kind = rf"(?:{'|'.join(KINDS)})(?::|\s|$)"
    begins = rf"{number}\s*\*|(?:{number}\s+)?{kind}"  # one that lacks its weight too, to say so
    parts = re.split(rf"\s*\+\s*(?={number}\s*\*\s*{kind})|\s+\+\s+(?={begins})", spec.strip())
    mixture = []
    for part in parts:
        weighted = re.fullmatch(rf"({number})\s*\*\s*(.+)", part)
        if weighted is None and len(parts) > 1:
            raise UserError(f"data.source {spec!r}: {part!r} has no weight; write each part as WEIGHT*SOURCE")
        weight = float(weighted[1]) if weighted else 1.0
        if not weight > 0:
            raise UserError(f"data.source {spec!r}: the weight {weighted[1] if weighted else weight} is not above 0; "
                            "give each source a weight above 0 or leave it out")
        mixture.append((weight, parse_source(weighted[2] if weighted else part)))
    return tuple(mixture)


def manifest(source: Source) -> tuple[SourceFile, ...]:
    """The source's files in reading order, with size and mtime. UserError where there are none."""
    if source.kind == "python-stdlib":
        paths = _stdlib_paths()
        if not paths:
            raise UserError("data.source python-stdlib: this interpreter's standard library holds no .py files; "
                            "give another source, such as text:GLOB")
    else:
        pattern = os.path.abspath(os.path.expanduser(source.pattern))
        paths = sorted(path for path in glob.glob(pattern, recursive=True) if not os.path.isdir(path))
        if os.path.isdir(pattern):
            inside = os.path.join(source.pattern, "**", "*." + ("txt" if source.kind == "text" else source.kind))
            raise UserError(f"data.source {source}: that is a folder; give a glob of its files, such as "
                            f"{source.kind}:{inside}")  # fmt: skip
        if not paths:
            raise UserError(f"data.source {source}: no file matches {pattern}; give the path or glob of existing files")
    files = []
    for path in paths:
        try:
            status = os.stat(path)
        except OSError as error:
            raise UserError(f"data.source {source}: cannot read {path} ({error.strerror}); mend or move it") from None
        files.append(SourceFile(path, status.st_size, status.st_mtime_ns))
    return tuple(files)


def _stdlib_paths() -> list[str]:
    root = sysconfig.get_paths()["stdlib"]
    paths = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _STDLIB_SKIPS]
        paths += [os.path.join(folder, name) for name in names if name.endswith(".py")]
    return sorted(paths)


def describe(source: Source) -> str:
    """The source's name; with the interpreter's version for python-stdlib, whose text differs by interpreter."""
    if source.kind == "python-stdlib":
        return f"python-stdlib of {platform.python_implementation()} {platform.python_version()}"
    return str(source)


def read(source: Source, files: tuple[SourceFile, ...]) -> Iterator[tuple[list[bytes], int]]:
    """Yields (documents, size): chunks of non-empty documents in order, and the bytes of files they stand for.

    The sizes sum to the sizes of the files. A document (for text, a whole file) is held in memory at once.
    UserError names the file (and line) that cannot be read or has no such field.
    """
    reader = {"jsonl": _read_jsonl, "parquet": _read_parquet, "array_record": _read_array_record}.get(
        source.kind, _read_text)
    documents: list[bytes] = []
    size = held = 0
    for file in files:
        try:
            for document, share in reader(source, file):
                size += share
                if document:
                    documents.append(document)
                    held += len(document)
                if held >= _CHUNK_BYTES:
                    yield documents, size
                    documents, size, held = [], 0, 0
        except OSError as error:
            raise UserError(f"data.source {source}: cannot read {file.path} ({error.strerror or error}); "
                            "make it readable or leave it out of the glob") from None
    if documents or size:
        yield documents, size


def _read_text(source: Source, file: SourceFile) -> Iterator[tuple[bytes, int]]:
    with open(file.path, "rb") as stream:
        yield stream.read(), file.size


def _read_jsonl(source: Source, file: SourceFile) -> Iterator[tuple[bytes, int]]:
    with open(file.path, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                yield b"", len(line)
                continue
            where = f"data.source {source}: line {number} of {file.path}"
            try:
                # surrogateescape carries bytes that are not UTF-8 through the JSON parser and back.
                record = json.loads(line.decode("utf-8", "surrogateescape"))
            except json.JSONDecodeError as error:
                raise UserError(f"{where} is not JSON ({error.msg}); give one JSON object a line") from None
            if not isinstance(record, dict):
                raise UserError(f"{where} is a {type(record).__name__}; give one JSON object a line")
            if source.field not in record:
                raise UserError(f"{where} has no field {source.field!r}; {_fields(list(record), 'jsonl')}")
            if not isinstance(record[source.field], str):
                raise UserError(f"{where}: field {source.field!r} is a {type(record[source.field]).__name__}, not a "
                                f"string; {_fields(list(record), 'jsonl')}")
            yield _to_bytes(record[source.field]), len(line)


def _to_bytes(text: str) -> bytes:
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # A JSON escape of half a surrogate pair: kept as the bytes it would have.
        return text.encode("utf-8", "surrogatepass")


def _fields(names: list[str], kind: str) -> str:
    return f"it has {', '.join(map(repr, names)) or 'none'}: name one as {kind}:GLOB#FIELD"


def _read_parquet(source: Source, file: SourceFile) -> Iterator[tuple[bytes, int]]:
    import pyarrow as pa
    import pyarrow.parquet

    where = f"data.source {source}: {file.path}"
    try:
        with pyarrow.parquet.ParquetFile(file.path) as table:
            names = table.schema_arrow.names
            if source.field not in names:
                raise UserError(f"{where} has no field {source.field!r}; {_fields(names, 'parquet')}")
            kind = table.schema_arrow.field(source.field).type
            if not any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary,
                                               pa.types.is_large_binary)):
                raise UserError(f"{where}: field {source.field!r} is {kind}, not a string; {_fields(names, 'parquet')}")
            rows, done, spent = table.metadata.num_rows, 0, 0
            for batch in table.iter_batches(batch_size=1024, columns=[source.field]):
                column = batch.column(0)
                column = column.cast(pa.large_binary()) if not pa.types.is_large_binary(kind) else column
                done += len(column)
                share, spent = file.size * done // rows - spent, file.size * done // rows
                yield b"", share
                for value in column.to_pylist():
                    yield value or b"", 0
            yield b"", file.size - spent
    except pa.ArrowException as error:
        raise UserError(f"{where} is not a whole parquet file ({str(error).splitlines()[0]}); "
                        "mend it or leave it out of the glob") from None


def _read_array_record(source: Source, file: SourceFile) -> Iterator[tuple[bytes, int]]:
    import grain

    try:
        records = grain.sources.ArrayRecordDataSource([file.path])
        count, spent = len(records), 0
        for i in range(count):
            share, spent = file.size * (i + 1) // count - spent, file.size * (i + 1) // count
            yield records[i], share
        yield b"", file.size - spent
    except (RuntimeError, ValueError) as error:
        raise UserError(f"data.source {source}: {file.path} is not a whole ArrayRecord file "
                        f"({str(error).splitlines()[0]}); mend it or leave it out of the glob") from None
