"""Writes so that it survives a crash: every change the store makes to a disk is made here.

Tests put a counting stand-in for :mod:`os` into this module to stop a save after each operation,
so nothing here may go around ``os``.
"""

from __future__ import annotations

import errno
import os
import stat
import uuid
from pathlib import Path

from mone_megatron.checkpoint.errors import write_error


def make_folder(path: Path) -> None:
    """Makes one new folder whose parent is there; it is on disk when this returns."""
    os.mkdir(path)
    sync(path.parent)


def write_new_file(path: Path, content: bytes) -> None:
    """Writes a file that must not be there yet; it is on disk when this returns.

    Raises:
        CheckpointWriteError: naming the path and the bytes needed. A part may have been written.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            left = memoryview(content)
            while left:
                left = left[os.write(descriptor, left) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise write_error(error, path, needed_bytes=len(content)) from error


def replace_file(path: Path, content: bytes) -> None:
    """Makes ``path`` hold ``content``: at every moment it is the old or the new file, whole.

    Raises:
        CheckpointWriteError: naming the path; ``path`` is then untouched, or already the new one.
    """
    temporary = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        write_new_file(temporary, content)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        if os.path.lexists(temporary):
            os.unlink(temporary)
        raise write_error(error, path, needed_bytes=len(content)) from error


def rename(old: Path, new: Path) -> None:
    """Renames a folder within one parent; its new name is on disk when this returns."""
    os.rename(old, new)
    sync(new.parent)


def sync(path: Path) -> None:
    """Brings a file's contents, or a folder's entries, to disk before it returns."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # File systems without fsync for folders (some network ones) say so with EINVAL.
        if error.errno != errno.EINVAL or not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise write_error(error, path) from error
    finally:
        os.close(descriptor)


def remove_tree(path: Path) -> None:
    """Removes a folder with all it holds, or a file. Links are removed, never followed.

    Entries that another process removes meanwhile are fine.
    """
    try:
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            os.unlink(path)
            return
        for name in os.listdir(path):
            remove_tree(path / name)
        os.rmdir(path)
    except FileNotFoundError:
        return
