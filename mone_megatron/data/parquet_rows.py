"""Reads documents out of Parquet: a row each, its text in a column."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mone_megatron.data.lines import NotUTF8Error, decode
from mone_megatron.data.records import BadRecord, Document, one_line

_ROWS = 1024
# What pyarrow raises for a damaged file, and for an encoding that it lacks.
_ERRORS = (pa.ArrowException, OSError)


def read_parquet(path: Path, column: str, domain: str | None) -> Iterator[Document | BadRecord]:
    """Yields the document of each row; a null is a document without text.

    Row groups and rows are counted from 0, as pyarrow does.

    Args:
        path: the file.
        column: the column that holds the text.
        domain: another column to read; None for none.

    Raises:
        ValueError: the file is not Parquet, or has not exactly one column of strings of that name.
        OSError: the file cannot be opened.
    """
    names = [column] if domain is None else [column, domain]
    # Opened here, since pyarrow takes no path that is not UTF-8.
    with path.open("rb") as raw:
        try:
            parquet = pq.ParquetFile(raw, page_checksum_verification=True)
            schema = parquet.schema_arrow
        except _ERRORS as error:
            raise ValueError(f"{path} is not a Parquet file ({one_line(error)})") from error
        for name in names:
            _check_column(path, schema, name)
        share = path.stat().st_size // max(1, parquet.metadata.num_rows)
        for group in range(parquet.num_row_groups):
            yield from _read_group(path, parquet, group, names, share)


def _check_column(path: Path, schema: pa.Schema, name: str) -> None:
    count = schema.names.count(name)
    if count == 0:
        names = ", ".join(map(repr, schema.names[:8]))
        raise ValueError(f"{path}: no column {name!r} (columns: {names}); give the text's")
    if count > 1:
        raise ValueError(f"{path}: {count} columns are named {name!r}; rename all but one")
    kind = schema.field(name).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ValueError(f"{path}: column {name!r} holds {kind}, not strings")


def _read_group(
    path: Path, parquet: pq.ParquetFile, group: int, names: list[str], share: int
) -> Iterator[Document | BadRecord]:
    row = 0
    try:
        for batch in parquet.iter_batches(
            batch_size=_ROWS, row_groups=[group], columns=list(dict.fromkeys(names))
        ):
            # As bytes, so that what is not UTF-8 is known by its row.
            columns = [_as_bytes(batch.column(name)) for name in names]
            for values in zip(*columns, strict=True):
                yield _document(f"{path}: row group {group}, row {row}", names, values, share)
                row += 1
    except _ERRORS as error:
        lost = parquet.metadata.row_group(group).num_rows - row
        yield BadRecord(
            f"{path}: row group {group} is damaged after row {row} ({one_line(error)})",
            records=max(1, lost),
        )


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
