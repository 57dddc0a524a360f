"""Says what a line of a file is, and how bytes become text: one rule for every reader."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# The longer ones first: that of UTF-32 begins with that of UTF-16.
_OTHER_MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


class NotUTF8Error(ValueError):
    """Says that bytes are not UTF-8.

    Attributes:
        reason: why not.
        position: that of the first wrong byte.
        looks_like: the encoding whose mark they begin with; None for none.
    """

    def __init__(self, reason: str, position: int, looks_like: str | None = None) -> None:
        super().__init__(f"not UTF-8 ({reason})")
        self.reason = reason
        self.position = position
        self.looks_like = looks_like


def decode(content: bytes) -> str:
    """Returns the text that ``content`` spells in UTF-8.

    Raises:
        NotUTF8Error: when it spells none; the message says why.
    """
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = content[error.start]
        for mark, name in _OTHER_MARKS.items():
            if content.startswith(mark):
                raise NotUTF8Error(f"it begins as {name} does", error.start, name) from None
        raise NotUTF8Error(f"{error.reason}: byte 0x{byte:02x}", error.start) from None


def check_characters(text: str) -> None:
    """Checks that ``text`` can be written as UTF-8.

    Raises:
        ValueError: it holds half of a surrogate pair, which is no character.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = ord(text[error.start])
        raise ValueError(f"holds half of a surrogate pair (\\u{half:04x})") from None


def numbered_lines(stream: Iterable[bytes]) -> Iterator[tuple[int, int, bytes]]:
    r"""Yields each line of a binary stream: its number from 1, its offset, and it without its end.

    A line ends with ``\n`` or ``\r\n`` and nothing else. A byte order mark at the beginning of the
    stream is left out.
    """
    offset = 0
    for number, line in enumerate(stream, start=1):
        after = offset + len(line)
        if number == 1 and line.startswith(BYTE_ORDER_MARK):
            line = line.removeprefix(BYTE_ORDER_MARK)
            offset += len(BYTE_ORDER_MARK)
        yield number, offset, line.removesuffix(b"\n").removesuffix(b"\r")
        offset = after


def has_text(text: str) -> bool:
    """Returns whether a document or line is more than white space."""
    return bool(text) and not text.isspace()


def read_lines(path: Path) -> list[str]:
    """Returns the lines of a file that hold text.

    Raises:
        ValueError: a line is not UTF-8; file and line are named.
        OSError: the file cannot be read.
    """
    lines = []
    with path.open("rb") as stream:
        for number, _, content in numbered_lines(stream):
            try:
                line = decode(content)
            except NotUTF8Error as error:
                fix = "; convert it with iconv" if error.looks_like else ""
                raise ValueError(f"{path}:{number}: {error}{fix}") from None
            if has_text(line):
                lines.append(line)
    return lines
