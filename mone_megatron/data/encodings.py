"""Reads files whose text is not UTF-8: their bytes become UTF-8, which every reader understands.

What spells no text in the encoding becomes bytes that are not UTF-8 either, so that the readers
find it in the record that it belongs to, and leave out that record alone.
"""

from __future__ import annotations

import codecs
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from mone_megatron.data.lines import NotUTF8Error

UTF_8 = "utf-8"
_OPTION = "--encoding"
_READ_BYTES = 1 << 16
_HANDLER = "mone_megatron.wrong_bytes"
# Half of a surrogate pair, which is no character and so not in UTF-8.
_WRONG = "\ud800"
_met = threading.local()


def _mark(error: UnicodeError) -> tuple[str, int]:
    """Takes note of bytes that spell nothing, and has a codec go on behind them."""
    assert isinstance(error, UnicodeDecodeError)
    # A copy: codecs change the one that they hand out.
    _met.errors.append((error.object, error.start, error.reason))
    return _WRONG, error.end


codecs.register_error(_HANDLER, _mark)


def check_encoding(name: str) -> str:
    """Returns the name that Python has for an encoding of text.

    Raises:
        ValueError: it is none.
    """
    try:
        found = codecs.lookup(name)
        codecs.getincrementaldecoder(name)
    except (LookupError, ValueError):
        raise ValueError(
            f"{_OPTION}: {name!r} is no encoding that Python knows; use one such as utf-8, utf-16, "
            "cp1252 or gb18030"
        ) from None
    # Python's own mark of codecs from bytes to bytes, such as hex and zlib.
    if not found._is_text_encoding:
        raise ValueError(f"{_OPTION}: {name!r} is no encoding of text; use one such as utf-8")
    return UTF_8 if found.name == "utf-8-sig" else found.name


class Encoding:
    """Says how the bytes of one file become text."""

    def __init__(self, name: str) -> None:
        """Takes the name of an encoding that :func:`check_encoding` gave."""
        self.name = name
        self._converted: _AsUTF8 | None = None

    def as_utf8(self, stream: BinaryIO) -> BinaryIO:
        """Returns a stream of the file's text in UTF-8."""
        if self.name == UTF_8:
            return stream
        self._converted = _AsUTF8(stream, self.name)
        return io.BufferedReader(self._converted)

    def wrong(self, error: NotUTF8Error, offset: int) -> str:
        """Returns what is wrong with a record, where in the file, and what to do.

        Args:
            error: of the record's bytes, as UTF-8.
            offset: where the record begins, in bytes of the stream of :meth:`as_utf8`.
        """
        if self._converted is None:
            if error.looks_like:
                return f"{error}; give {_OPTION} {error.looks_like.lower()}"
            return (
                f"not UTF-8 ({error.reason} at offset {offset + error.position}); give the file's "
                f"own {_OPTION}, such as cp1252 (Western Europe) or gb18030 (Chinese)"
            )
        # Only the first is shown to anybody, and this is it.
        reason = self._converted.first_wrong or error.reason
        return self._not_it(reason)

    @contextmanager
    def naming(self, path: Path) -> Iterator[None]:
        """Names the file when it cannot be of the encoding at all.

        Raises:
            ValueError: what the codec said, with the file and what to do.
        """
        try:
            yield
        except UnicodeError as error:
            raise ValueError(f"{path}: {self._not_it(str(error))}") from None

    def _not_it(self, reason: str) -> str:
        return (
            f"not {self.name} ({reason}); leave {_OPTION} out for UTF-8, or give the one in which "
            "the file was written"
        )

    @property
    def is_utf8_as_well(self) -> bool:
        """Returns whether what was read in another encoding is UTF-8 too, beyond ASCII.

        Text of another encoding is so only by the rarest chance.
        """
        return self._converted is not None and self._converted.is_utf8_as_well


class _AsUTF8(io.RawIOBase):
    """Reads text of any encoding as UTF-8."""

    def __init__(self, stream: BinaryIO, encoding: str) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder(encoding)(_HANDLER)
        self._utf8: codecs.IncrementalDecoder | None = codecs.getincrementaldecoder(UTF_8)()
        self._beyond_ascii = False
        self._rest = b""
        self._taken = 0
        self._ended = False
        # What spelt nothing first, and its offset in the file.
        self.first_wrong = ""

    @property
    def is_utf8_as_well(self) -> bool:
        return self._utf8 is not None and self._beyond_ascii

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        while not self._rest and not self._ended:
            piece = self._stream.read(_READ_BYTES)
            self._ended = not piece
            self._rest = self._convert(piece)
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count

    def _convert(self, piece: bytes) -> bytes:
        self._try_as_utf8(piece)
        _met.errors = []
        text = self._decoder.decode(piece, final=self._ended)
        self._taken += len(piece)
        if _met.errors and not self.first_wrong:
            decoded, start, reason = _met.errors[0]
            # What was decoded is the end of what was read so far.
            offset = self._taken - len(decoded) + start
            self.first_wrong = f"{reason}: byte 0x{decoded[start]:02x} at offset {offset}"
        return text.encode(UTF_8, "surrogatepass")

    def _try_as_utf8(self, piece: bytes) -> None:
        if self._utf8 is not None:
            try:
                text = self._utf8.decode(piece, final=self._ended)
                self._beyond_ascii = self._beyond_ascii or not text.isascii()
            except UnicodeDecodeError:
                self._utf8 = None
