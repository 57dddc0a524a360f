"""Opens compressed files of text: gzip and Zstandard, by their names' endings."""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

# The ending of a file's name -> what its compression is called.
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
# What reading a damaged or cut file raises.
DAMAGES = (gzip.BadGzipFile, EOFError, zlib.error)


class _DamagedZstdError(EOFError):
    """Says that a file is not whole Zstandard."""


def compression_of(path: Path) -> str | None:
    """Returns ``gzip``, ``zstd`` or, for a file that is not compressed, None."""
    return COMPRESSIONS.get(path.suffix.lower())


def without_compression(path: Path) -> Path:
    """Returns the name that the file has when it is not compressed."""
    return path.with_suffix("") if compression_of(path) else path


def decompressed(path: Path, raw: BinaryIO) -> BinaryIO:
    """Returns the stream of what is in the open file ``raw``; it raises one of ``DAMAGES``.

    Args:
        path: the file's name, which tells its compression.
        raw: the open file.
    """
    kind = compression_of(path)
    if kind is None:
        return raw
    if kind == "gzip":
        # GzipFile reads like a binary file but is not declared as one.
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    assert kind == "zstd"
    return io.BufferedReader(_Zstd(raw))


class _Zstd(io.RawIOBase):
    """Reads what is in a Zstandard file, of one frame or several."""

    def __init__(self, raw: BinaryIO) -> None:
        self._stream = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")

    def readable(self) -> bool:
        """Returns True."""
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """Reads into a buffer and returns how many bytes; 0 at the end."""
        try:
            piece = self._stream.read(len(buffer))
        except OSError as error:
            # The system's own errors have a number.
            if error.errno is not None:
                raise
            raise _DamagedZstdError(" ".join(str(error).split())) from None
        buffer[: len(piece)] = piece
        return len(piece)
