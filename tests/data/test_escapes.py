"""Escapes of command lines."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mone_megatron.data.escapes import unescape


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (r"\n--\n", "\n--\n"),
        (r"\t\r\0", "\t\r\0"),
        (r"\\n", r"\n"),
        (r"\x0c\x1E", "\f\x1e"),
        (r"\u2028\U0001f600", "\u2028\U0001f600"),
        (r"a\"b\'c", "a\"b'c"),
        ("é|", "é|"),
        # An escaped backslash does not join what follows.
        (r"\\x41", r"\x41"),
    ],
)
def test_what_is_understood(written: str, meant: str) -> None:
    assert unescape(written) == meant


@given(st.text())
def test_a_text_without_backslashes_stays(text: str) -> None:
    plain = text.replace("\\", "")
    assert unescape(plain) == plain
    assert unescape(text.replace("\\", "\\\\")) == text


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (r"\q", "is no known escape"),
        ("\\", "a lone backslash"),
        (r"\x4", r"\\x needs 2 hexadecimal digits"),
        (r"\u12g4", "needs 4 hexadecimal"),
        (r"\U0011", "needs 8 hexadecimal"),
        (r"\ud800", "number of no character"),
        (r"\U00110000", "number of no character"),
    ],
)
def test_what_is_not_is_refused(written: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unescape(written)
