"""Reads characters that are awkward to type on a command line, written with a backslash."""

from __future__ import annotations

import re

_NAMED = {
    "n": "\n",
    "t": "\t",
    "r": "\r",
    "0": "\0",
    "a": "\a",
    "b": "\b",
    "e": "\x1b",
    "f": "\f",
    "v": "\v",
    "\\": "\\",
    "'": "'",
    '"': '"',
}
# How many hexadecimal digits follow each of these.
_DIGITS = {"x": 2, "u": 4, "U": 8}
_ESCAPE = re.compile(
    r"\\(?:(?P<x>x[0-9A-Fa-f]{2})|(?P<u>u[0-9A-Fa-f]{4})|(?P<U>U[0-9A-Fa-f]{8})|(?P<other>.?))",
    re.DOTALL,
)


def unescape(text: str) -> str:
    r"""Returns ``text`` with its escapes replaced by the characters that they stand for.

    Understood are ``\n \t \r \\ \0 \a \b \e \f \v \' \"``, ``\xHH``, ``\uXXXX`` and ``\UXXXXXXXX``;
    the last three give the character of that number in Unicode.

    Raises:
        ValueError: another escape, or a number that is no character.
    """
    return _ESCAPE.sub(_character, text)


def _character(found: re.Match[str]) -> str:
    escape = found.group()
    letter = found.group("other")
    if letter is None:
        number = int(escape[2:], 16)
        if number > 0x10FFFF or 0xD800 <= number <= 0xDFFF:
            raise ValueError(f"{escape} is the number of no character")
        return chr(number)
    if letter in _DIGITS:
        raise ValueError(f"{escape} needs {_DIGITS[letter]} hexadecimal digits after it")
    if letter not in _NAMED:
        shown = escape if letter else r"a lone backslash at the end"
        raise ValueError(f"{shown} is no known escape; write \\\\ for a backslash")
    return _NAMED[letter]
