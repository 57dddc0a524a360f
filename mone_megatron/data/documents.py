"""Reads documents out of JSON lines, plain text and Parquet files, one at a time."""

from __future__ import annotations

import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import pyarrow as pa
import pyarrow.parquet as pq

Format = Literal["jsonl", "text", "parquet"]

_EXTENSIONS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "text",
    ".md": "text",
    ".py": "text",
    ".parquet": "parquet",
}
_COMPRESSED: tuple[Format, ...] = ("jsonl", "text")
_READ_CHARACTERS = 1 << 20
_PARQUET_ROWS = 1024


@dataclass(frozen=True)
class InputSettings:
    """Where the text is inside the input files."""

    # Key of a JSON object that holds its text.
    json_key: str = "text"
    # Column of a Parquet file that holds the text.
    column: str = "text"
    # Splits a plain text file into documents; None makes each file one document.
    document_separator: str | None = None
    # Reads every file in this format whatever its extension; None goes by the extension.
    format: Format | None = None


@dataclass(frozen=True)
class Document:
    """One document and how many bytes of its file were read to get it (for progress)."""

    text: str
    bytes_read: int


def expand_inputs(patterns: Sequence[str]) -> list[Path]:
    """Files named by paths and globs: patterns in the order given, each one's files sorted.

    Raises:
        ValueError: a pattern names no file, a folder, or a file named before.
    """
    files: list[Path] = []
    for pattern in patterns:
        if Path(pattern).exists():
            found = [Path(pattern)]
        else:
            found = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
            found = [path for path in found if path.is_file()]
        if not found:
            raise ValueError(f"{pattern}: no such file, and no file matches it as a glob")
        if found[0].is_dir():
            raise ValueError(f"{pattern} is a folder; name its files, as in '{pattern}/*.jsonl'")
        files.extend(found)
    seen: set[Path] = set()
    for path in files:
        if path.resolve() in seen:
            raise ValueError(f"{path} is named twice among the inputs")
        seen.add(path.resolve())
    return files


def file_format(path: Path, settings: InputSettings) -> Format:
    """The format ``path`` is read in.

    Raises:
        ValueError: its extension is not known and no format is set.
    """
    if settings.format is not None:
        return settings.format
    name = path.name.lower()
    compressed = name.endswith(".gz")
    kind = _EXTENSIONS.get(Path(name.removesuffix(".gz")).suffix)
    if kind is None or (compressed and kind not in _COMPRESSED):
        known = ", ".join([*_EXTENSIONS, ".jsonl.gz", ".txt.gz"])
        raise ValueError(f"{path}: unknown extension; known: {known} (or give --format)")
    return kind


def read_documents(path: Path, settings: InputSettings) -> Iterator[Document]:
    """Documents of one file, in order, empty ones included.

    Raises:
        ValueError: the file cannot be read as its format; file and line (or row) are named.
    """
    kind = file_format(path, settings)
    if kind == "parquet":
        yield from _read_parquet(path, settings.column)
        return
    with path.open("rb") as raw:
        stream: BinaryIO = raw
        if path.name.lower().endswith(".gz"):
            # GzipFile reads like a binary file but is not declared as one.
            stream = gzip.GzipFile(fileobj=raw)  # type: ignore[assignment]
        try:
            if kind == "jsonl":
                yield from _read_jsonl(path, raw, stream, settings.json_key)
            else:
                yield from _read_text(path, raw, stream, settings.document_separator)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is not a whole gzip file ({error})") from error


def _read_jsonl(path: Path, raw: BinaryIO, stream: BinaryIO, key: str) -> Iterator[Document]:
    position = 0
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{number}: not UTF-8 ({error.reason})") from error
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: invalid JSON ({error.msg})") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}:{number}: not a JSON object")
        if key not in record:
            keys = ", ".join(map(repr, list(record)[:8])) or "none"
            raise ValueError(f"{path}:{number}: no key {key!r} (keys: {keys}); see --json-key")
        text = record[key]
        if not isinstance(text, str):
            raise ValueError(f"{path}:{number}: {key!r} is not a string")
        yield Document(text, raw.tell() - position)
        position = raw.tell()


def _read_text(
    path: Path, raw: BinaryIO, stream: BinaryIO, separator: str | None
) -> Iterator[Document]:
    # newline="" keeps the text exactly as it is in the file.
    reader = io.TextIOWrapper(stream, encoding="utf-8", newline="")
    position = 0
    rest = ""
    try:
        while piece := reader.read(_READ_CHARACTERS):
            rest += piece
            if separator is None:
                continue
            *whole, rest = rest.split(separator)
            for text in whole:
                yield Document(text, raw.tell() - position)
                position = raw.tell()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason})") from error
    yield Document(rest, raw.tell() - position)


def _read_parquet(path: Path, column: str) -> Iterator[Document]:
    try:
        parquet = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is not a Parquet file ({error})") from error
    with parquet:
        schema = parquet.schema_arrow
        if column not in schema.names:
            names = ", ".join(map(repr, schema.names[:8]))
            raise ValueError(f"{path}: no column {column!r} (columns: {names}); see --column")
        kind = schema.field(column).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise ValueError(f"{path}: column {column!r} holds {kind}, not strings")
        share = path.stat().st_size // max(1, parquet.metadata.num_rows)
        for batch in parquet.iter_batches(batch_size=_PARQUET_ROWS, columns=[column]):
            for text in batch.column(0).to_pylist():
                # A null is a document without text.
                yield Document(text or "", share)
