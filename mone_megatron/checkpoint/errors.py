"""Says what can be wrong with a checkpoint: one exception per reason, each message one line."""

from __future__ import annotations

import errno
import functools
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DamagedCheckpointError(ValueError):
    """Says that a checkpoint is not what was saved.

    Attributes:
        folder: the checkpoint.
        problems: one line for each file, ``NAME: what is wrong``.
    """

    def __init__(self, folder: Path, problems: Sequence[str]) -> None:
        self.folder = folder
        self.problems = tuple(problems)
        shown = "; ".join(self.problems[:5])
        more = f"; and {len(self.problems) - 5} more" if len(self.problems) > 5 else ""
        super().__init__(f"checkpoint {folder} is damaged: {shown}{more}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Returns what pickles it, since errors travel between ranks."""
        return DamagedCheckpointError, (self.folder, self.problems)


class NoUsableCheckpointError(ValueError):
    """Says that there were checkpoints, and none of them verifies."""


class UnsafePickleError(ValueError):
    """Says that a stored object wants a class or function off the allow-list; nothing ran."""


class CheckpointWriteError(OSError):
    """Says that a checkpoint, or its tracker, was not written; those before are untouched.

    Attributes:
        path: the file or folder that could not be written.
        needed_bytes: what was to be written there, where known.
    """

    def __init__(self, path: Path, reason: str, *, number: int, needed_bytes: int | None) -> None:
        super().__init__(number, reason, str(path))
        self.path = path
        self.needed_bytes = needed_bytes
        needed = "" if needed_bytes is None else f"; {needed_bytes} bytes needed"
        if number in _NO_SPACE:
            needed += f"; {_free_bytes(path)} bytes free"
        self._reason = reason
        self._message = f"cannot write {path}: {reason}{needed}"

    def __reduce__(self) -> tuple[Any, ...]:
        """Returns what pickles it with its message, since errors travel between ranks."""
        rebuild = functools.partial(
            CheckpointWriteError, number=self.errno or errno.EIO, needed_bytes=self.needed_bytes
        )
        return rebuild, (self.path, self._reason), {"_message": self._message}

    def __str__(self) -> str:
        return self._message


def write_error(
    error: BaseException, path: Path, *, needed_bytes: int | None = None
) -> CheckpointWriteError:
    """Returns ``error``, met while writing ``path``, as a :class:`CheckpointWriteError`.

    A library's own exception around a failed write (torch raises ``RuntimeError``) counts as an
    input/output error, unless one it came from says more.

    Args:
        error: what was caught; returned as it is when it is one already.
        path: what was being written; a file that ``error`` names itself comes first.
        needed_bytes: how much was to be written, where known.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, CheckpointWriteError):
            return cause
        if isinstance(cause, OSError):
            # A descriptor's number names nothing.
            named = path
            if cause.filename and not isinstance(cause.filename, int):
                named = Path(os.fsdecode(cause.filename))
            return CheckpointWriteError(
                named,
                cause.strerror or " ".join(str(cause).split()),
                number=cause.errno or errno.EIO,
                needed_bytes=needed_bytes,
            )
        cause = cause.__cause__ or cause.__context__
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return CheckpointWriteError(path, reason, number=errno.EIO, needed_bytes=needed_bytes)


def _free_bytes(path: Path) -> int:
    """Returns the free bytes of the file system that holds ``path`` or its nearest parent."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free
