"""Says what the operating system refuses in one line: the key or option, the file, the reason."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def unusable(key: str, path: Path, error: OSError) -> ValueError:
    """Returns an error that says what the system said of ``path``, the key or option and a fix."""
    return ValueError(f"{key}: cannot use {str(path)!r} ({explained(error)}); name another")


def explained(error: OSError) -> str:
    """Returns what the system said, and the file it is about: ``Permission denied: /a/b``."""
    reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
    if error.filename is None or isinstance(error.filename, int):
        return reason
    return f"{reason}: {os.fsdecode(error.filename)}"


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Lets an error of the system that names no file (a full disk on writing) name ``path``."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


@contextmanager
def readable(what: str) -> Iterator[None]:
    """Lets an error of the system in the block refuse ``what``, a key or option with its value.

    Raises:
        ValueError: in one line, with the reason and the fix.
    """
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{what}: cannot be read ({explained(error)}); make it readable, or name another"
        ) from error
