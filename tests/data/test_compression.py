"""Files of text that are compressed are read as what is in them, or refused by name."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from mone_megatron.data.documents import DocumentReader, InputSettings, file_format

TEXTS = [f"text {number} with some more words ä" for number in range(3000)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    packed: bytes = sink.getvalue().to_pybytes()
    return packed


PACK: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstd}
NAMES = {".gz": "gzip", ".zst": "zstd"}


def read(path: Path, **settings: str) -> list[str]:
    reader = DocumentReader(InputSettings(**settings))  # type: ignore[arg-type]
    return [document.text for document in reader.read(path)]


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("stem", ["a.jsonl", "A.JSONL", "b.ndjson"])
def test_lines_are_those_of_the_file_that_is_not_compressed(
    ending: str, stem: str, tmp_path: Path
) -> None:
    path = tmp_path / f"{stem}{ending}"
    path.write_bytes(PACK[ending](LINES))
    assert read(path) == TEXTS
    # Two that are written one after the other are one.
    path.write_bytes(PACK[ending](LINES) + PACK[ending](LINES))
    assert read(path) == TEXTS * 2


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("stem", ["a.txt", "a.md", "a.py"])
def test_plain_text_is_what_was_packed(ending: str, stem: str, tmp_path: Path) -> None:
    path = tmp_path / f"{stem}{ending}"
    path.write_bytes(PACK[ending]("one\n--\ntwo ä\n".encode()))
    assert read(path, document_separator="--\n") == ["one\n", "two ä\n"]


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("stem", ["a.jsonl", "a.txt"])
@pytest.mark.parametrize("damage", ["cut", "other"])
def test_one_that_is_not_whole_is_named(
    ending: str, stem: str, damage: str, tmp_path: Path
) -> None:
    path = tmp_path / f"{stem}{ending}"
    whole = PACK[ending](LINES)
    path.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"no such thing at all")
    with pytest.raises(ValueError, match=rf"not a whole {NAMES[ending]} file \(") as refused:
        read(path)
    assert str(refused.value).startswith(str(path))
    assert "\n" not in str(refused.value)


def test_progress_counts_bytes_of_the_file_and_not_of_what_is_in_it(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstd(LINES))
    reader = DocumentReader(InputSettings())
    total = sum(document.bytes_read for document in reader.read(path))
    assert total == path.stat().st_size < len(LINES)


@pytest.mark.parametrize("name", ["a.parquet.zst", "a.parquet.gz", "a.zst", "a.csv.zst"])
def test_what_is_not_read_compressed_says_what_is(name: str) -> None:
    with pytest.raises(ValueError, match=r"unknown extension; known: .*\.jsonl\.zst, \.txt\.zst"):
        file_format(Path(name), InputSettings())


def test_an_error_of_the_disk_stays_one(tmp_path: Path) -> None:
    from mone_megatron.data.compression import decompressed

    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        decompressed(tmp_path / "a.txt.zst", Failing()).read()
