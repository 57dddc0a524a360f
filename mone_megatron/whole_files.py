"""Writes files that are there whole or not at all, among them JSON that every reader accepts."""

from __future__ import annotations

import json
import math
import os
import stat
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mone_megatron.os_errors import naming


def write_whole(path: Path, content: str | bytes, *, durable: bool = False) -> Path:
    """Writes a file so that others see the old one, or the new one whole, and returns its path.

    The content goes to a temporary file in the same folder, which then takes the name. The folder
    is made when it is missing. What a link names is written and the link stays; a device or a pipe
    (``/dev/null``, ``/dev/stdout``) is written into, and stays what it is.

    Args:
        path: what to write.
        content: text is written as UTF-8.
        durable: whether the content is on the disk before the file takes the name, so that it
            outlives a machine that stops.

    Raises:
        OSError: naming the file; nothing of it is left.
    """
    # A path may hold bytes that Python could not read as letters; they go back as they came.
    raw = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path):
        if _is_to_stay(path):
            with path.open("wb") as stream:
                stream.write(raw)
            return path
        place = Path(os.path.realpath(path))
        handle, temporary = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(raw)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            # mkstemp makes private files; what a run writes is as readable as its other files.
            os.chmod(temporary, 0o644)
            os.replace(temporary, place)
        except BaseException:
            os.unlink(temporary)
            raise
    return path


def _is_to_stay(path: Path) -> bool:
    """Returns whether no file may take the place of what is there.

    As root one would: then /dev/null is a file, and everything that is thrown away fills it.
    """
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    # A process's own standard output may be a file, which others still write into.
    own = path.parent in (Path("/dev"), Path("/dev/fd")) or path.is_relative_to("/proc")
    return own or not stat.S_ISREG(there.st_mode)


def write_json(path: Path, value: Any, *, indent: int = 2) -> Path:
    """Writes ``value`` as :func:`json_text` and as :func:`write_whole` do; returns the path."""
    return write_whole(path, json_text(value, indent=indent))


def json_text(
    value: Any,
    *,
    indent: int | None = 2,
    separators: tuple[str, str] | None = None,
    default: Callable[[Any], Any] | None = None,
) -> str:
    """Returns ``value`` as strict JSON that ends with a newline.

    Python writes ``NaN`` and ``Infinity``, which other readers refuse; here a number that is not
    finite is ``null``.

    Args:
        value: mappings, lists, tuples, texts, numbers, truth values and None.
        indent: spaces a level; None for one line, as in a file of JSON lines.
        separators: what stands between items, and between a key and its value; None for Python's.
        default: gives what stands for a value of another kind; without it such a value is a
            TypeError.
    """
    text = json.dumps(
        _finite(value), indent=indent, separators=separators, allow_nan=False, default=default
    )
    return text + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
