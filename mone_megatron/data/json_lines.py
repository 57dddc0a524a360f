"""Reads documents out of JSON lines: one object a line, its text under a key."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mone_megatron.data.compression import DAMAGES, compression_of
from mone_megatron.data.encodings import Encoding
from mone_megatron.data.lines import NotUTF8Error, check_characters, decode, numbered_lines
from mone_megatron.data.records import BadRecord, Document

# The pairs of a JSON object in order, as they stand.
_Pairs = tuple[tuple[str, Any], ...]


def read_json_lines(
    path: Path,
    raw: BinaryIO,
    stream: BinaryIO,
    encoding: Encoding,
    key: str,
    domain: str | None,
) -> Iterator[Document | BadRecord]:
    """Yields the document of each line; lines of white space are left out.

    Args:
        path: the file's name, for messages.
        raw: the open file, for progress.
        stream: ``raw``, or what decompresses it and makes it UTF-8.
        encoding: of the file, for messages.
        key: holds the text; null is a document without text.
        domain: another key to read; None for none.

    Raises:
        ValueError: the file is not what its compression says.
    """
    position = number = 0
    try:
        for number, offset, line in numbered_lines(stream):
            if not line.strip():
                continue
            try:
                pairs = _parse(line)
                text = _string(pairs, key)
                group = None if domain is None else _string(pairs, domain)
            except NotUTF8Error as error:
                yield BadRecord(f"{path}:{number}: {encoding.wrong(error, offset)}")
                continue
            except ValueError as error:
                yield BadRecord(f"{path}:{number}: {error}")
                continue
            yield Document(text, raw.tell() - position, group)
            position = raw.tell()
    except DAMAGES as error:
        if number == 0:
            raise ValueError(
                f"{path} is not a whole {compression_of(path)} file ({error})"
            ) from error
        yield BadRecord(f"{path}:{number + 1}: not a whole {compression_of(path)} file ({error})")


def _parse(line: bytes) -> _Pairs:
    try:
        # Numbers are not needed, and the largest that Python converts has 4,300 digits.
        record = json.loads(
            decode(line),
            object_pairs_hook=tuple,
            parse_int=_number,
            parse_float=_number,
            parse_constant=_refuse_constant,
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"invalid JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise ValueError("invalid JSON (nested too deeply to be read)") from None
    if not isinstance(record, tuple):
        raise ValueError("not a JSON object")
    return record


def _number(digits: str) -> int:
    return 0


def _refuse_constant(name: str) -> None:
    raise ValueError(f"invalid JSON ({name} is no number of JSON)")


def _string(pairs: _Pairs, key: str) -> str:
    """Returns the text under ``key``; none under null."""
    found = [value for name, value in pairs if name == key]
    if not found:
        keys = ", ".join(repr(name) for name, _ in pairs[:8]) or "none"
        raise ValueError(f"no key {key!r} (keys: {keys}); give the key that holds the text")
    if len(found) > 1:
        raise ValueError(f"{len(found)} keys are {key!r}; which one counts is not defined")
    text = found[0]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(f"{key!r} is not a string")
    try:
        check_characters(text)
    except ValueError as error:
        raise ValueError(f"{key!r} {error}") from None
    return text
