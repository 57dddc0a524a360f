"""Lists a folder's files and hashes them by SHA-256, the work split over ranks and threads."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from mone_megatron.checkpoint import durable
from mone_megatron.checkpoint.errors import write_error

MANIFEST_NAME = "manifest.json"
_BLOCK_BYTES = 4 << 20
# Hashing releases the interpreter lock; more threads than this wait for the disk.
_MAX_THREADS = 8
_BYTES_PER_THREAD = 16 << 20

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class FileDigest:
    """Describes one file of a checkpoint: its length in bytes, and its SHA-256 as hex."""

    size: int
    sha256: str


@dataclass
class Listing:
    """Lists what a folder holds, by name relative to it with ``/`` between parts; no manifest."""

    # Regular files and their sizes in bytes.
    files: dict[str, int] = field(default_factory=dict)
    # Folders, those with nothing in them too.
    folders: list[str] = field(default_factory=list)
    # Links, sockets, pipes, devices: never part of a checkpoint, never followed.
    strange: list[str] = field(default_factory=list)


def list_files(folder: Path) -> Listing:
    """Lists everything below ``folder`` but its own manifest.

    Raises:
        OSError: the folder cannot be read.
    """
    listing = Listing()
    pending = [""]
    while pending:
        prefix = pending.pop()
        with os.scandir(folder / prefix) as entries:
            for entry in entries:
                name = prefix + entry.name
                mode = entry.stat(follow_symlinks=False).st_mode
                if stat.S_ISDIR(mode):
                    listing.folders.append(name)
                    pending.append(name + "/")
                elif not stat.S_ISREG(mode):
                    listing.strange.append(name)
                elif name != MANIFEST_NAME:
                    listing.files[name] = entry.stat(follow_symlinks=False).st_size
    return listing


def share_of(sizes: Mapping[str, int], rank: int, world_size: int) -> list[str]:
    """Returns the files one rank reads: about equal bytes each, every file on exactly one rank.

    Args:
        sizes: bytes of each file; the same on every rank.
        rank: whose share.
        world_size: how many ranks share the work.
    """
    loads = [0] * world_size
    share: list[str] = []
    # Largest first onto the least loaded rank; names settle ties, so every rank agrees.
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        target = loads.index(min(loads))
        # An empty file costs opening it.
        loads[target] += sizes[name] + 1
        if target == rank:
            share.append(name)
    return share


def digest_file(path: Path, *, sync: bool = False) -> FileDigest:
    """Returns the size and the SHA-256 of a file as it is read back.

    Args:
        path: a regular file; a link is refused.
        sync: first bring it to disk.

    Raises:
        OSError: it cannot be read, or brought to disk.
    """
    if sync:
        durable.sync(path)
    digest = hashlib.sha256()
    size = 0
    block = memoryview(bytearray(_BLOCK_BYTES))
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    with open(descriptor, "rb", buffering=0) as stream:
        while count := stream.readinto(block):
            digest.update(block[:count])
            size += count
    return FileDigest(size=size, sha256=digest.hexdigest())


def digest_files(
    folder: Path, *, rank: int = 0, world_size: int = 1, sync: bool = True
) -> dict[str, FileDigest]:
    """Returns digests of this rank's share of the files in ``folder``, by relative name.

    Call it on every rank once all of them have written; the union over ranks is what
    ``CheckpointStore.commit`` takes.

    Args:
        folder: a partial checkpoint.
        rank: this rank.
        world_size: how many ranks share the work.
        sync: bring each file to disk before reading it.

    Raises:
        ValueError: the folder holds a link or another thing that is no file.
        CheckpointWriteError: a file cannot be read back or brought to disk.
    """
    try:
        listing = list_files(folder)
    except OSError as error:
        raise write_error(error, folder) from error
    if listing.strange:
        raise ValueError(f"{folder / listing.strange[0]} is not a regular file; remove it")
    share = share_of(listing.files, rank, world_size)

    def digest(name: str) -> FileDigest:
        try:
            return digest_file(folder / name, sync=sync)
        except OSError as error:
            raise write_error(error, folder / name, needed_bytes=listing.files[name]) from error

    return dict(zip(share, _map(digest, share, listing.files), strict=True))


def damaged_files(
    folder: Path, expected: Mapping[str, FileDigest], *, rank: int = 0, world_size: int = 1
) -> list[str]:
    """Checks this rank's share of a checkpoint's files against what was saved.

    Rank 0 looks for files that should not be there, too.

    Returns:
        One line for each damaged file, ``NAME: what is wrong``, sorted; none when all are sound.
    """
    sizes = {name: digest.size for name, digest in expected.items()}
    share = share_of(sizes, rank, world_size)
    problems: list[str] = []
    if rank == 0:
        try:
            problems += _surplus(list_files(folder), expected)
        except OSError as error:
            return [f"{folder.name}: cannot be read ({error.strerror})"]
    found = _map(lambda name: _problem(folder / name, expected[name]), share, sizes)
    problems += [f"{n}: {problem}" for n, problem in zip(share, found, strict=True) if problem]
    return sorted(problems)


def _surplus(listing: Listing, expected: Mapping[str, FileDigest]) -> list[str]:
    needed = {parent for name in expected for parent in _parents(name)}
    return [
        *(f"{name}: not in {MANIFEST_NAME}" for name in listing.files if name not in expected),
        *(f"{name}: not in {MANIFEST_NAME}" for name in listing.folders if name not in needed),
        *(f"{name}: not a regular file" for name in listing.strange if name not in expected),
    ]


def _parents(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[:length]) for length in range(1, len(parts))]


def _problem(path: Path, expected: FileDigest) -> str:
    """Returns what is wrong with one file; an empty text when nothing is."""
    try:
        status = os.lstat(path)
        if not stat.S_ISREG(status.st_mode):
            return "not a regular file"
        # Told without reading the file.
        if status.st_size != expected.size:
            return f"{status.st_size} bytes, {MANIFEST_NAME} says {expected.size}"
        if digest_file(path).sha256 != expected.sha256:
            return f"its SHA-256 is not the one in {MANIFEST_NAME}"
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return ""


def _map(
    function: Callable[[str], _Result], names: Sequence[str], sizes: Mapping[str, int]
) -> list[_Result]:
    """Returns ``function`` of each file, by as many threads as the bytes are worth."""
    worth = 1 + sum(sizes[name] for name in names) // _BYTES_PER_THREAD
    threads = min(_MAX_THREADS, os.cpu_count() or 1, worth)
    if threads == 1:
        return [function(name) for name in names]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, names))
