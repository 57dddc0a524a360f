"""Makes documents of the rows of Arrow tables, which Parquet files and datasets hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from mone_megatron.data.lines import NotUTF8Error, decode
from mone_megatron.data.records import BadRecord, Document

# What pyarrow raises for a damaged file, and for an encoding that it lacks.
DAMAGES = (pa.ArrowException, OSError)


def check_columns(path: Path, schema: pa.Schema, names: list[str]) -> None:
    """Checks that a table has columns of text.

    Raises:
        ValueError: one is missing, there twice, or holds no strings.
    """
    for name in names:
        count = schema.names.count(name)
        if count == 0:
            columns = ", ".join(map(repr, schema.names[:8]))
            raise ValueError(f"{path}: no column {name!r} (columns: {columns}); give the text's")
        if count > 1:
            raise ValueError(f"{path}: {count} columns are named {name!r}; rename all but one")
        kind = schema.field(name).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise ValueError(f"{path}: column {name!r} holds {kind}, not strings")


def rows_of(
    batch: pa.RecordBatch, names: list[str], *, where: str, first: int, share: int
) -> Iterator[Document | BadRecord]:
    """Yields the document of each row; a null is a document without text.

    Args:
        batch: has the columns.
        names: the text's column, and that of the domain if there is one.
        where: file and part of it, for messages.
        first: the number of the batch's first row in it.
        share: bytes of the file that a row stands for.
    """
    # As bytes, so that what is not UTF-8 is known by its row.
    columns = [_as_bytes(batch.column(name)) for name in names]
    for row, values in enumerate(zip(*columns, strict=True), start=first):
        yield _document(f"{where}row {row}", names, values, share)


def _as_bytes(column: pa.Array) -> list[bytes | None]:
    kind = pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary()
    values: list[bytes | None] = column.cast(kind).to_pylist()
    return values


def _document(
    where: str, names: list[str], values: tuple[bytes | None, ...], share: int
) -> Document | BadRecord:
    texts = []
    for name, value in zip(names, values, strict=True):
        try:
            texts.append(decode(value or b""))
        except NotUTF8Error as error:
            return BadRecord(f"{where}: column {name!r} is {error}")
    return Document(texts[0], share, texts[1] if len(texts) > 1 else None)
