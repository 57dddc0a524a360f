"""Reads documents out of Arrow files, such as Hugging Face datasets are saved in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from mone_megatron.data.records import BadRecord, Document, one_line
from mone_megatron.data.table_rows import DAMAGES, check_columns, rows_of

# What a file begins with whose batches can be read in any order; a stream begins otherwise.
_FILE_MARK = b"ARROW1"


def read_arrow(path: Path, column: str, domain: str | None) -> Iterator[Document | BadRecord]:
    """Yields the document of each row; a null is a document without text.

    One batch of rows is in memory at a time, as large as its writer made it. Rows are counted from
    0.

    Args:
        path: a file or a stream of Arrow's.
        column: the column that holds the text.
        domain: another column to read; None for none.

    Raises:
        ValueError: the file is not Arrow, or has not exactly one column of strings of that name.
        OSError: the file cannot be opened.
    """
    names = [column] if domain is None else [column, domain]
    with path.open("rb") as raw:
        try:
            schema, batches = _open(raw)
        except DAMAGES as error:
            raise ValueError(f"{path} is not an Arrow file ({one_line(error)})") from error
        check_columns(path, schema, names)
        row = position = 0
        try:
            for batch in batches:
                read, position = raw.tell() - position, raw.tell()
                share = max(0, read) // max(1, batch.num_rows)
                yield from rows_of(batch, names, where=f"{path}: ", first=row, share=share)
                row += batch.num_rows
        except DAMAGES as error:
            yield BadRecord(f"{path}: is damaged after row {row} ({one_line(error)})")


def _open(raw: BinaryIO) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    mark = raw.read(len(_FILE_MARK))
    raw.seek(0)
    if mark != _FILE_MARK:
        stream = pa.ipc.open_stream(raw)
        return stream.schema, iter(stream)
    file = pa.ipc.open_file(raw)
    return file.schema, (file.get_batch(index) for index in range(file.num_record_batches))
