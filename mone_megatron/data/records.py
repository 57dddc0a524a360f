"""Holds what the readers of the file formats yield."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """Holds one document and how many bytes of its file were read to get it (for progress)."""

    text: str
    bytes_read: int
    # What its record holds under the field that names domains; None when none was asked for.
    domain: str | None = None


@dataclass(frozen=True)
class BadRecord:
    """Describes a part of a file that is no document."""

    # File and line, row or row group, and what is wrong: one line.
    message: str
    # How many records are lost with it.
    records: int = 1


def one_line(error: BaseException) -> str:
    """Returns the first line of what an error says."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
