"""What documents are read out of files, and what is told of those that cannot be read."""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mone_megatron.command_line import exit_status
from mone_megatron.data.documents import DocumentReader, InputSettings
from mone_megatron.data.framing import DocumentEncoder, template_opening
from mone_megatron.data.indexed import bin_path, read_index
from mone_megatron.data.preprocess import TokenizerSettings, preprocess_files
from mone_megatron.display import harmless
from mone_megatron.testing.tokenizers import with_bos
from mone_megatron.testing.tools import load_tool

SEPARATOR = "\n\x1e\n"
# No surrogates, which no file can hold; no separator.
TEXTS = st.lists(
    st.one_of(
        st.sampled_from(["", " ", "\n", "\r\n", "\u2028", "\x0c", "a<|endoftext|>b", "<s>x", "é"]),
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x1e"), max_size=20),
    ),
    min_size=1,
    max_size=6,
)


def read(path: Path, **inputs: object) -> list[str]:
    reader = DocumentReader(InputSettings(**inputs))  # type: ignore[arg-type]
    return [document.text for document in reader.read(path)]


@given(texts=TEXTS, bos=st.booleans())
@settings(max_examples=25, deadline=None)
def test_every_format_gives_every_tool_the_same_tokens(
    texts: list[str], bos: bool, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    transformers = pytest.importorskip("transformers")
    from mone_megatron.evaluation.corpora import Reader, open_corpus

    with tempfile.TemporaryDirectory(dir=tmp_path_factory.getbasetemp()) as name:
        folder = Path(name)
        if bos:
            tokenizer = folder / "tokenizer"
            with_bos(tokenizer_dir, tokenizer)
        else:
            tokenizer = tokenizer_dir
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / "a.jsonl").write_text(lines, encoding="utf-8")
        # A byte order mark and not a part of the text, as it begins the file.
        whole = SEPARATOR.join(texts)
        (folder / "a.txt").write_bytes(b"\xef\xbb\xbf" + whole.encode())
        pq.write_table(pa.table({"text": texts}), folder / "a.parquet")
        inputs = InputSettings(document_separator=SEPARATOR)
        loaded = transformers.AutoTokenizer.from_pretrained(tokenizer)
        reader = Reader(loaded, 400, 10_000)
        streams = []
        for kind in ("jsonl", "txt", "parquet"):
            file = folder / f"a.{kind}"
            try:
                preprocess_files(
                    [file], folder / kind, TokenizerSettings(folder=tokenizer), inputs=inputs
                )
            except ValueError as error:
                assert "empty" in str(error)  # noqa: PT017  # either tool refuses it
                with pytest.raises(ValueError, match="holds no text"):
                    open_corpus(str(file), inputs).windows(reader, lambda remark: None)
                streams.append([])
                continue
            dtype = read_index(folder / kind).dtype
            tokens = np.fromfile(bin_path(folder / kind), dtype).tolist()
            (window,) = open_corpus(str(file), inputs).windows(reader, lambda remark: None)
            assert window.tolist() == (tokens if bos else [0, *tokens])
            streams.append(tokens)
        assert streams[0] == streams[1] == streams[2]
        encoder = DocumentEncoder(loaded.backend_tokenizer, reader.framing)
        assert streams[0] == [token for text in texts for token in encoder.encode(text)]


def test_line_ends_and_marks(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [
        '{"text": "a\\u2028b"}\r',
        " \t\r",
        '{"text": "c\\u000bd"}',
        '{"text": "e\u0085\u2028f"}',
    ]
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
    assert read(path) == ["a\u2028b", "c\x0bd", "e\u0085\u2028f"]
    text = tmp_path / "a.txt"
    text.write_bytes(b"\xef\xbb\xbfone\r\ntwo\xef\xbb\xbf\r\n")
    assert read(text) == ["one\r\ntwo\ufeff\r\n"]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1 << 20])
def test_separators_across_reads(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mone_megatron.data.plain_text._READ_BYTES", size)
    content = "é--é---\n\n--漢字--"
    (tmp_path / "a.txt").write_text(content, encoding="utf-8")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(content.encode()))
    for name in ("a.txt", "a.txt.gz"):
        assert read(tmp_path / name, document_separator="--") == content.split("--")


def damaged_parquet(path: Path) -> None:
    """Three row groups of 20 rows, the end of the middle one's page overwritten."""
    texts = [f"text {number} " * 50 for number in range(60)]
    # Only a checksum shows that uncompressed text is another one.
    how = {"compression": "none", "write_page_checksum": True} if "checksum" in path.name else {}
    pq.write_table(pa.table({"text": texts}), path, row_group_size=20, use_dictionary=False, **how)
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    end = column.data_page_offset + column.total_compressed_size
    content[end - 40 : end] = b"t" * 40
    path.write_bytes(content)


def not_utf8_parquet(path: Path) -> None:
    texts = pa.array([b"good", b"b\xffd", b"fine"], pa.binary()).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"text": texts}), path)


def twice_parquet(path: Path) -> None:
    table = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, path)


DEEP = b'{"text": "x", "m": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"
GOOD = b'{"text": "good"}\n'
# Name -> (content, what is told in one line, how many documents are left).
BAD: dict[str, tuple[bytes, str, int]] = {
    "surrogate.jsonl": (GOOD + b'{"text": "bad \\ud83d"}\n', "surrogate.jsonl:2: 'text' holds", 1),
    "deep.jsonl": (DEEP + GOOD, "deep.jsonl:1: invalid JSON (nested too deeply", 1),
    "twice.jsonl": (b'{"text": "a", "text": "b"}\n' + GOOD, "twice.jsonl:1: 2 keys are 'text'", 1),
    "nan.jsonl": (GOOD + b'{"text": "x", "n": NaN}\n', "nan.jsonl:2: invalid JSON (NaN is", 1),
    "minus.jsonl": (b'{"text": "x", "n": -Infinity}\n' + GOOD, "minus.jsonl:1: invalid JSON", 1),
    "cut.jsonl": (GOOD + b'{"text": "x', "cut.jsonl:2: invalid JSON", 1),
    "latin.jsonl": (GOOD + b'{"text": "\xe9"}\n', "latin.jsonl:2: not UTF-8", 1),
    "key.jsonl": (GOOD + b'{"body": "x"}\n', "key.jsonl:2: no key 'text' (keys: 'body')", 1),
    "utf16.txt": ("text".encode("utf-16"), "utf16.txt:1: not UTF-8 (it begins as UTF-16", 0),
    "latin.txt": (b"one\ntwo\n==\nthree\ncaf\xe9\n==\nfour", "latin.txt:5: not UTF-8", 2),
    "cut.jsonl.gz": (
        gzip.compress(GOOD * 5 + os.urandom(4000).hex().encode() + b"\n", mtime=0)[:2000],
        "cut.jsonl.gz:6: not a whole gzip file",
        5,
    ),
}
PARQUET = {
    "damaged.parquet": (damaged_parquet, "damaged.parquet: row group 1 is damaged after row", 40),
    "checksum.parquet": (damaged_parquet, "checksum.parquet: row group 1 is damaged after", 40),
    "latin.parquet": (not_utf8_parquet, "latin.parquet: row group 0, row 1: column 'text' is", 2),
}


def bad_file(folder: Path, name: str) -> tuple[Path, str, int]:
    path = folder / name
    if name in BAD:
        content, message, left = BAD[name]
        path.write_bytes(content)
    else:
        write, message, left = PARQUET[name]
        write(path)
    return path, message, left


@pytest.mark.parametrize("name", [*BAD, *PARQUET])
def test_a_bad_record_stops_or_is_skipped_and_counted(name: str, tmp_path: Path) -> None:
    path, message, left = bad_file(tmp_path, name)
    inputs = {"document_separator": "\n==\n"} if name.endswith(".txt") else {}
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # compared below
        read(path, **inputs)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    reader = DocumentReader(InputSettings(on_error="skip", **inputs))  # type: ignore[arg-type]
    found = [document.text for document in reader.read(path)]
    assert len(found) == left
    assert all("good" in text or "t" in text or "f" in text for text in found)
    if not left:
        with pytest.raises(ValueError, match=r"nothing but bad records \(1\)"):
            reader.remarks()
        return
    (remark,) = [line for line in reader.remarks() if "skipped" in line]
    lost = 20 if name in ("damaged.parquet", "checksum.parquet") else 1
    assert remark.startswith(f"{lost} bad record{'s' * (lost > 1)} skipped; the first: ")
    assert message in remark


def test_what_is_not_wrong_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    pairs = [
        b'{"text": "big", "id": ' + b"9" * 5000 + b"}",
        b'{"text": "pair \\ud83d\\ude00", "n": 1e999}',
        b'{"text": null}',
        b'{"m": {"text": 1, "text": 2}, "text": "inner"}',
    ]
    path.write_bytes(b"\n".join(pairs))
    assert read(path) == ["big", "pair \U0001f600", "", "inner"]
    table = pa.table({"text": pa.array(["a", None], pa.large_string()), "a.text": [1, 2]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ["a", ""]


def test_refused_whatever_on_error_says(tmp_path: Path) -> None:
    twice_parquet(tmp_path / "twice.parquet")
    (tmp_path / "none.parquet").write_bytes(b"PAR1 is how it begins")
    (tmp_path / "none.jsonl.gz").write_bytes(b"no gzip")
    for name, message in (
        ("twice.parquet", "2 columns are named 'text'"),
        ("none.parquet", "is not a Parquet file"),
        ("none.jsonl.gz", "is not a whole gzip file"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            read(tmp_path / name, on_error="skip")
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_paths_need_not_be_utf8(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    place = Path(os.fsdecode(folder))
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    (tmp_path / "a.parquet").rename(place / "a.parquet")
    (place / "a.txt").write_text("a")
    (place / "a.jsonl").write_text('{"text": "a"}\n')
    for kind in ("parquet", "txt", "jsonl"):
        assert read(place / f"a.{kind}") == ["a"]


def test_no_path_of_the_tool_need_be_utf8(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / os.fsdecode(b"caf\xe9")
    place.mkdir()
    (place / "a.txt").write_text("one two three")
    tool = load_tool("preprocess_data")
    trained = [place / "a.txt", "--output", place / "one", "--train-tokenizer", 260]
    used = [place / "a.txt", "--output", place / "two", "--tokenizer", place / "one.tokenizer"]
    for arguments in (trained, used):
        assert tool([str(each) for each in arguments]) == 0, capsys.readouterr().err
        assert "in 1 documents" in capsys.readouterr().out
    assert (place / "one.bin").read_bytes() == (place / "two.bin").read_bytes()


def test_results_that_cannot_be_spelled_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(out, encoding="ascii"))

    @harmless
    def tool() -> int:
        return exit_status(lambda options: print("1 ± 2", "\udce9"), argparse.Namespace())

    status = tool()
    assert (status, out.getvalue()) == (0, b"1 \\xb1 2 \\udce9\n")


def run_tool(tmp_path: Path, tokenizer: Path, *arguments: object) -> int:
    prefix = tmp_path / "out" / "corpus"
    tool = load_tool("preprocess_data")
    given = [*arguments, "--output", prefix, "--tokenizer", tokenizer, "--overwrite"]
    return tool([str(argument) for argument in given])


def test_the_tool_tells_of_what_it_left_out(
    tmp_path: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, message, _ = bad_file(tmp_path, "surrogate.jsonl")
    for workers in (1, 2):
        assert run_tool(tmp_path, tokenizer_dir, path, "--workers", workers) == 2
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
        assert message in line
    assert run_tool(tmp_path, tokenizer_dir, path, "--on-error", "skip") == 0
    shown = capsys.readouterr()
    assert "1 bad record skipped; the first: " in shown.err
    assert "in 1 documents" in shown.out


@pytest.mark.parametrize(
    ("separator", "message"),
    [
        (r"\n==\n", r"--document-separator '\n==\n': is in none of 1 text files"),
        (r"\q", r"--document-separator: \q is no known escape"),
        (r"\n", None),
    ],
)
def test_separators_that_do_nothing_are_told(
    separator: str,
    message: str | None,
    tmp_path: Path,
    tokenizer_dir: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "a.txt").write_text("one\r\ntwo\nthree", encoding="utf-8")
    code = run_tool(tmp_path, tokenizer_dir, tmp_path / "a.txt", "--document-separator", separator)
    shown = capsys.readouterr()
    assert code == (2 if separator == r"\q" else 0)
    if message is None:
        assert "separator" not in shown.err
        assert "in 3 documents" in shown.out
    else:
        assert message in shown.err


def test_a_separator_is_not_empty() -> None:
    with pytest.raises(ValueError, match="--document-separator: is empty; leave it out"):
        InputSettings(document_separator="")


def test_a_separator_without_text_files_is_told(
    tmp_path: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    path = tmp_path / "a.jsonl"
    assert run_tool(tmp_path, tokenizer_dir, path, "--document-separator", "x") == 0
    assert "is for plain text, and of 1 files none is" in capsys.readouterr().err


def test_the_template_is_found(tokenizer_dir: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    for number, (template, wanted) in enumerate(
        [("<s> $A", 1), ("<s> $A <|endoftext|>", 1), ("$A <|endoftext|>", 0), ("", 0)]
    ):
        bos = with_bos(tokenizer_dir, tmp_path / str(number), template=template)
        tokenizer = Tokenizer.from_file(str(tmp_path / str(number) / "tokenizer.json"))
        assert template_opening(tokenizer) == (bos,) * wanted
