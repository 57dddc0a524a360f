"""Reads documents out of Parquet: a row each, its text in a column."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq

from mone_megatron.data.records import BadRecord, Document, one_line
from mone_megatron.data.table_rows import DAMAGES, check_columns, rows_of

_ROWS = 1024


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
        except DAMAGES as error:
            raise ValueError(f"{path} is not a Parquet file ({one_line(error)})") from error
        check_columns(path, schema, names)
        share = path.stat().st_size // max(1, parquet.metadata.num_rows)
        for group in range(parquet.num_row_groups):
            yield from _read_group(path, parquet, group, names, share)


def _read_group(
    path: Path, parquet: pq.ParquetFile, group: int, names: list[str], share: int
) -> Iterator[Document | BadRecord]:
    row = 0
    where = f"{path}: row group {group}, "
    try:
        for batch in parquet.iter_batches(
            batch_size=_ROWS, row_groups=[group], columns=list(dict.fromkeys(names))
        ):
            yield from rows_of(batch, names, where=where, first=row, share=share)
            row += batch.num_rows
    except DAMAGES as error:
        lost = parquet.metadata.row_group(group).num_rows - row
        yield BadRecord(
            f"{path}: row group {group} is damaged after row {row} ({one_line(error)})",
            records=max(1, lost),
        )
