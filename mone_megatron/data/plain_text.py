"""Reads documents out of plain text: a whole file, or its parts between separators."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from mone_megatron.data.compression import DAMAGES, compression_of
from mone_megatron.data.encodings import Encoding
from mone_megatron.data.lines import BYTE_ORDER_MARK, NotUTF8Error, decode
from mone_megatron.data.records import BadRecord, Document

_READ_BYTES = 1 << 20


def read_plain_text(
    path: Path, raw: BinaryIO, stream: BinaryIO, encoding: Encoding, separator: str | None
) -> Iterator[Document | BadRecord]:
    """Yields the documents of a file exactly as they stand in it, line ends included.

    A byte order mark at the beginning of the file is left out.

    Args:
        path: the file's name, for messages.
        raw: the open file, for progress.
        stream: ``raw``, or what decompresses it and makes it UTF-8.
        encoding: of the file, for messages.
        separator: stands between documents; None for one document.

    Raises:
        ValueError: the file is not what its compression says.
    """
    # Bytes are split rather than text: what is not UTF-8 is then one document's fault. No character
    # begins inside another one, so the places are the same.
    mark = None if separator is None else separator.encode("utf-8")
    rest = bytearray()
    line, position, began = 1, 0, False
    # Of the document that is being read, in the stream.
    offset = 0
    try:
        while piece := stream.read(_READ_BYTES):
            # What was searched before is not searched again, but where the pieces meet.
            seek = max(0, len(rest) - len(mark) + 1) if mark else 0
            if not began and piece.startswith(BYTE_ORDER_MARK):
                piece = piece.removeprefix(BYTE_ORDER_MARK)
                offset = len(BYTE_ORDER_MARK)
            rest += piece
            began = True
            if mark is None:
                continue
            begin = 0
            while (end := rest.find(mark, seek)) >= 0:
                content = bytes(rest[begin:end])
                yield _document(path, encoding, content, line, offset, raw.tell() - position)
                position = raw.tell()
                offset += len(content) + len(mark)
                line += content.count(b"\n") + mark.count(b"\n")
                begin = seek = end + len(mark)
            del rest[:begin]
    except DAMAGES as error:
        if not began:
            raise ValueError(
                f"{path} is not a whole {compression_of(path)} file ({error})"
            ) from error
        where = line + rest.count(b"\n")
        yield BadRecord(f"{path}:{where}: not a whole {compression_of(path)} file ({error})")
        return
    yield _document(path, encoding, bytes(rest), line, offset, raw.tell() - position)


def _document(
    path: Path, encoding: Encoding, content: bytes, line: int, offset: int, bytes_read: int
) -> Document | BadRecord:
    try:
        return Document(decode(content), bytes_read)
    except NotUTF8Error as error:
        line += content.count(b"\n", 0, error.position)
        return BadRecord(f"{path}:{line}: {encoding.wrong(error, offset)}")
