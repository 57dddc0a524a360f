"""Refuses unfit output folders, and tells large files apart by parts of them."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mone_megatron.ownership import OWNER_FILE


def check_output(folder: Path, marker: str) -> None:
    """Refuses an output folder before time is spent on what would go there, and leaves nothing
    behind.

    Args:
        folder: need not be there.
        marker: a file that results of the same kind always hold, so that they may be replaced or
            gone on with.

    Raises:
        ValueError: naming ``--output``: nothing can be written there, or it holds files and no
            ``marker``.
    """
    place = folder.absolute()
    try:
        while not place.exists():
            place = place.parent
        if place.is_dir():
            with tempfile.TemporaryFile(dir=place):
                pass
    except OSError as error:
        raise ValueError(
            f"--output: nothing can be written in {place} ({error.strerror}); give another folder"
        ) from None
    foreign = False
    if place == folder.absolute() and place.is_dir() and not (folder / marker).exists():
        foreign = any(path.name != OWNER_FILE for path in folder.iterdir())
    if not place.is_dir() or foreign:
        raise ValueError(
            f"--output: {folder} holds files and no {marker}; give a folder that is new or empty"
        )


def files_identity(files: Sequence[Path]) -> str:
    """Returns the SHA-256 of the names and sizes of files, and of their first and last 64 KiB."""
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}:".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(1 << 16))
            stream.seek(max(0, size - (1 << 16)))
            digest.update(stream.read())
    return digest.hexdigest()
