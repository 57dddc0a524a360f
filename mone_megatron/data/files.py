"""Holds small file operations whose order matters: durable renames and digests."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

_BLOCK = 1 << 20
# Files up to this size are hashed whole at every start; larger ones by sampled blocks.
FULL_DIGEST_BYTES = 64 << 20
_SAMPLED_BLOCKS = 64
_SAMPLED_BLOCK_BYTES = 64 << 10


def sha256_file(path: Path) -> str:
    """Returns the SHA-256 of a whole file, as hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def quick_digest(path: Path) -> str:
    """Returns a digest of a file, as hex, that is cheap enough to take at every start.

    Up to ``FULL_DIGEST_BYTES`` it is :func:`sha256_file`; above, the SHA-256 of the size and of
    64 blocks of 64 KiB spread evenly from the first byte to the last.
    """
    size = path.stat().st_size
    if size <= FULL_DIGEST_BYTES:
        return sha256_file(path)
    digest = hashlib.sha256(f"sampled {size}\n".encode())
    last_start = size - _SAMPLED_BLOCK_BYTES
    with path.open("rb") as stream:
        for block in range(_SAMPLED_BLOCKS):
            stream.seek(last_start * block // (_SAMPLED_BLOCKS - 1))
            digest.update(stream.read(_SAMPLED_BLOCK_BYTES))
    return digest.hexdigest()


def sync_file(path: Path) -> None:
    """Returns once the contents of ``path`` (a file or a folder's entries) are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
