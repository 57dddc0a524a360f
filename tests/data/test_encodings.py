"""Text in other encodings than UTF-8, and what is told of one that is wrong."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from mone_megatron.data.documents import DocumentReader, InputSettings

TEXTS = ["café", "naïve\nÀ", "plain"]
ENCODINGS = ["cp1252", "utf-16", "UTF-16-BE", "utf-32-le", "latin-1", "utf-8-sig", "gb18030"]


def read(path: Path, **settings: object) -> tuple[list[str], list[str]]:
    reader = DocumentReader(InputSettings(**settings))  # type: ignore[arg-type]
    return [document.text for document in reader.read(path)], reader.remarks()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_format_of_text_in_it(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Characters, line ends and separators across reads.
    monkeypatch.setattr("mone_megatron.data.encodings._READ_BYTES", 7)
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\r\n" for text in TEXTS)
    (tmp_path / "a.jsonl").write_bytes(lines.encode(encoding))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("\n--\n".join(TEXTS).encode(encoding)))
    assert read(tmp_path / "a.jsonl", encoding=encoding) == (TEXTS, [])
    separated = read(tmp_path / "a.txt.gz", encoding=encoding, document_separator="\n--\n")
    assert separated == (TEXTS, [])


def test_no_character_is_cut_by_a_separator(tmp_path: Path) -> None:
    # In GBK the second byte of the first one is "|".
    text = "倈|漢"
    assert text.encode("gbk").count(b"|") == 2
    (tmp_path / "a.txt").write_bytes(text.encode("gbk"))
    assert read(tmp_path / "a.txt", encoding="gbk", document_separator="|")[0] == ["倈", "漢"]


LINE = b'{"text": "x"}\n'
WRONG: dict[str, tuple[str, bytes, str, str]] = {
    "latin as UTF-8": ("a.jsonl", LINE + b'{"text": "\xe9"}\n', "utf-8", "a.jsonl:2: not UTF-8 "
        "(invalid continuation byte: byte 0xe9 at offset 24); give the file's own --encoding"),
    "after a mark": ("a.txt", b"\xef\xbb\xbfone\ncaf\xe9", "utf-8", "a.txt:2: not UTF-8 "
        "(unexpected end of data: byte 0xe9 at offset 10); give"),
    "UTF-16 as UTF-8": ("a.txt", "x".encode("utf-16"), "utf-8", "a.txt:1: not UTF-8 (it begins as "
        "UTF-16 does); give --encoding utf-16"),
    "not in the code page": ("a.txt", b"one\n\x81", "cp1252", "a.txt:2: not cp1252 (character maps "
        "to <undefined>: byte 0x81 at offset 4); leave --encoding out for UTF-8, or give"),
    "far into a file": ("a.jsonl", LINE * 10_000 + b'{"text": "\xff\xff"}\n', "gb18030",
        "a.jsonl:10001: not gb18030 (illegal multibyte sequence: byte 0xff at offset 140010)"),
    "half a character": ("a.txt", "one".encode("utf-16-le") + b"x", "utf-16-le", "a.txt:1: not "
        "utf-16-le (truncated data: byte 0x78 at offset 6)"),
    "without its mark": ("a.jsonl", LINE, "utf-16", "a.jsonl: not utf-16 (UTF-16 stream does not "
        "start with BOM); leave --encoding out for UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_one_names_file_offset_and_what_to_try(case: str, tmp_path: Path) -> None:
    name, content, encoding, message = WRONG[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the message is checked
        read(tmp_path / name, encoding=encoding)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_records_that_are_not_in_it_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"text": "\x81"}\n' + '{"text": "é"}\n'.encode("cp1252") + b'{"text": "\x81"}'
    )
    texts, (remark,) = read(path, encoding="cp1252", on_error="skip")
    assert texts == ["é"]
    assert remark.startswith("2 bad records skipped; the first: ")
    assert "a.jsonl:1: not cp1252" in remark


def test_what_looks_like_utf8_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("é 漢", encoding="utf-8")
    (tmp_path / "ascii.txt").write_text("e")
    (remark,) = read(tmp_path / "a.txt", encoding="latin-1")[1]
    assert "1 file can be read as UTF-8 as well" in remark
    assert read(tmp_path / "ascii.txt", encoding="latin-1")[1] == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("klingon", "'klingon' is no encoding that Python knows; use one such as utf-8"),
        ("", "'' is no encoding that Python knows"),
        ("a\0b", "is no encoding that Python knows"),
        ("hex", "'hex' is no encoding of text"),
        ("rot13", "'rot13' is no encoding of text"),
    ],
)
def test_what_is_no_encoding(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^--encoding: .*{message.partition(';')[0]}"):
        InputSettings(encoding=name)
