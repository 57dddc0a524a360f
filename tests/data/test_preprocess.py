from __future__ import annotations

import gzip
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mone_megatron.data import preprocess
from mone_megatron.data.documents import InputSettings, expand_inputs
from mone_megatron.data.files import sha256_file
from mone_megatron.data.indexed import bin_path, idx_path, read_index
from mone_megatron.data.preprocess import TokenizerSettings, preprocess_files
from mone_megatron.data.sidecar import read_sidecar, tokenizer_path
from mone_megatron.data.tokenizer import end_of_document, load_tokenizer, train_tokenizer
from mone_megatron.testing.launch import import_path

from .conftest import expected_documents, make_texts, write_jsonl

REPOSITORY = Path(__file__).resolve().parents[2]
# The tool finds the package of this checkout, installed or not.
ENVIRONMENT = {**os.environ, "PYTHONPATH": import_path(REPOSITORY)}


def read_documents(prefix: Path) -> list[list[int]]:
    index = read_index(prefix)
    tokens = np.fromfile(bin_path(prefix), dtype=index.dtype)
    return [part.tolist() for part in np.split(tokens, np.cumsum(index.lengths)[:-1])]


def write_input(folder: Path, kind: str, texts: list[str]) -> tuple[list[Path], InputSettings]:
    if kind == "jsonl":
        return [write_jsonl(folder / "a.jsonl", texts, "body")], InputSettings(json_key="body")
    if kind == "jsonl.gz":
        plain = write_jsonl(folder / "a.jsonl", texts)
        packed = folder / "b.jsonl.gz"
        packed.write_bytes(gzip.compress(plain.read_bytes()))
        return [packed], InputSettings()
    if kind == "text":
        files = []
        for number, text in enumerate(texts):
            files.append(folder / f"{number:03}.txt")
            files[-1].write_bytes(text.encode())
        return expand_inputs([str(folder / "*.txt")]), InputSettings()
    if kind == "separated":
        path = folder / "all.txt"
        path.write_bytes("\r\n==\r\n".join(texts).encode())
        return [path], InputSettings(document_separator="\r\n==\r\n")
    path = folder / "a.parquet"
    pq.write_table(pa.table({"n": list(range(len(texts))), "body": texts}), path, row_group_size=7)
    return [path], InputSettings(column="body")


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "text", "separated", "parquet"])
def test_round_trip(tmp_path: Path, tokenizer_dir: Path, kind: str) -> None:
    texts = [*make_texts(30), "two\r\nlines\n"]
    files, inputs = write_input(tmp_path, kind, texts)
    prefix = tmp_path / "out" / "corpus"
    summary = preprocess_files(
        files, prefix, TokenizerSettings(folder=tokenizer_dir), inputs=inputs
    )
    expected = expected_documents(tokenizer_dir, texts)
    assert read_documents(prefix) == expected
    sidecar = read_sidecar(prefix)
    assert sidecar is not None
    assert summary.tokens == sidecar.tokens == sum(map(len, expected))
    assert summary.documents == sidecar.documents == len(texts)
    assert sidecar.max_token == max(map(max, expected))
    assert (sidecar.vocab_size, sidecar.eod) == (300, 0)
    assert sidecar.bin_sha256 == sha256_file(bin_path(prefix))
    assert sidecar.idx_sha256 == sha256_file(idx_path(prefix))
    assert sorted(path.name for path in prefix.parent.iterdir()) == [
        "corpus.bin",
        "corpus.idx",
        "corpus.meta.json",
        "corpus.tokenizer",
    ]


def test_files_are_those_of_megatron_core(tmp_path: Path, tokenizer_dir: Path) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    texts = make_texts(20)
    prefix = tmp_path / "ours"
    preprocess_files(
        [write_jsonl(tmp_path / "a.jsonl", texts)], prefix, TokenizerSettings(folder=tokenizer_dir)
    )
    theirs = tmp_path / "theirs"
    builder = IndexedDatasetBuilder(str(bin_path(theirs)), dtype=np.uint16)
    for document in expected_documents(tokenizer_dir, texts):
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(idx_path(theirs)))
    assert bin_path(prefix).read_bytes() == bin_path(theirs).read_bytes()
    assert idx_path(prefix).read_bytes() == idx_path(theirs).read_bytes()


def test_output_does_not_depend_on_workers(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preprocess, "_CHUNK_DOCUMENTS", 3)
    source = write_jsonl(tmp_path / "a.jsonl", ["", *make_texts(60), "  "])
    outputs = []
    for workers in (1, 3):
        prefix = tmp_path / str(workers) / "corpus"
        settings = TokenizerSettings(folder=tokenizer_dir)
        summary = preprocess_files([source], prefix, settings, workers=workers)
        assert summary.skipped_empty == 2
        names = sorted(path for path in prefix.parent.rglob("*") if path.is_file())
        outputs.append([(path.name, path.read_bytes()) for path in names])
    assert outputs[0] == outputs[1]


def test_trained_tokenizer_reloads_as_a_hugging_face_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    texts = make_texts(50)
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    prefix = tmp_path / "corpus"
    preprocess_files([source], prefix, TokenizerSettings(train_vocab_size=310))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_path(prefix))
    assert tokenizer.eos_token == "<|endoftext|>"
    assert len(tokenizer) == 310
    assert [
        [*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts
    ] == read_documents(prefix)
    assert tokenizer.decode(read_documents(prefix)[0][:-1]) == texts[0]
    again = tmp_path / "again"
    preprocess_files([source], again, TokenizerSettings(train_vocab_size=310))
    assert bin_path(again).read_bytes() == bin_path(prefix).read_bytes()


def test_a_document_cannot_end_itself(tmp_path: Path, tokenizer_dir: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["one<|endoftext|>two"])
    plain, parsed = tmp_path / "plain", tmp_path / "parsed"
    preprocess_files([source], plain, TokenizerSettings(folder=tokenizer_dir))
    settings = TokenizerSettings(folder=tokenizer_dir, parse_special_tokens=True)
    preprocess_files([source], parsed, settings)
    assert read_documents(plain)[0].count(0) == 1
    assert read_documents(parsed)[0].count(0) == 2


def test_end_of_document_token(tmp_path: Path, tokenizer_dir: Path) -> None:
    loaded = load_tokenizer(tokenizer_dir)
    assert end_of_document(loaded) == 0
    fox = loaded.tokenizer.token_to_id("e")
    assert end_of_document(loaded, "e") == fox
    with pytest.raises(ValueError, match="no token 'missing'"):
        end_of_document(loaded, "missing")
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())
    # Without a settings file the usual name is found; with one, what it says counts.
    assert end_of_document(load_tokenizer(tmp_path)) == 0
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "e"}}')
    assert end_of_document(load_tokenizer(tmp_path)) == fox


def run_refused(tmp_path: Path, name: str, content: bytes, tokenizer: Path, **inputs: str) -> str:
    path = tmp_path / name
    path.write_bytes(content)
    prefix = tmp_path / "out" / "corpus"
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # messages are the caller's to check
        preprocess_files(
            [path],
            prefix,
            TokenizerSettings(folder=tokenizer),
            inputs=InputSettings(**inputs),  # type: ignore[arg-type]
        )
    assert not prefix.parent.exists() or not list(prefix.parent.iterdir())
    message = str(caught.value)
    assert "\n" not in message
    return message


# Without the time of day: all workers must collect the same parameters.
GZIP = gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)


@pytest.mark.parametrize(
    ("name", "content", "inputs", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n\n{"text": }\n', {}, "a.jsonl:3: invalid JSON"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"body": "x"}\n',
            {},
            "a.jsonl:2: no key 'text' (keys: 'body')",
        ),
        ("a.jsonl", b'{"text": "x"}\n', {"json_key": "body"}, "a.jsonl:1: no key 'body'"),
        ("a.jsonl", b'{"text": 3}\n', {}, "a.jsonl:1: 'text' is not a string"),
        ("a.jsonl", b"[1]\n", {}, "a.jsonl:1: not a JSON object"),
        ("a.jsonl", b'{"text": "\xff"}\n', {}, "a.jsonl:1: not UTF-8"),
        ("a.jsonl", b'{"text": ""}\n{"text": " "}\n', {}, "empty: 2 documents read"),
        ("a.jsonl", b"", {}, "empty: 0 documents read"),
        ("a.txt", b"\xff\xfe", {}, "a.txt:1: not UTF-8"),
        ("a.csv", b"x", {}, "a.csv: unknown extension"),
        ("a.parquet", b"x", {}, "a.parquet is not a Parquet file"),
        ("a.jsonl.gz", b"x", {}, "a.jsonl.gz is not a whole gzip file"),
        ("a.jsonl.gz", GZIP[:-9], {}, "not a whole gzip file"),
    ],
)
def test_refuses_input(
    tmp_path: Path,
    tokenizer_dir: Path,
    name: str,
    content: bytes,
    inputs: dict[str, str],
    message: str,
) -> None:
    assert message in run_refused(tmp_path, name, content, tokenizer_dir, **inputs)


def test_refuses_parquet_columns(tmp_path: Path, tokenizer_dir: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": [1], "body": ["x"]}), path)
    content = path.read_bytes()
    message = run_refused(tmp_path, "b.parquet", content, tokenizer_dir)
    assert "b.parquet: no column 'text' (columns: 'n', 'body')" in message
    message = run_refused(tmp_path, "b.parquet", content, tokenizer_dir, column="n")
    assert "column 'n' holds int64, not strings" in message


def test_refuses_paths_and_tokenizers(tmp_path: Path, tokenizer_dir: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["x"])
    with pytest.raises(ValueError, match="no such file"):
        expand_inputs([str(tmp_path / "*.txt")])
    with pytest.raises(ValueError, match="is a folder"):
        expand_inputs([str(tmp_path)])
    with pytest.raises(ValueError, match="named twice"):
        expand_inputs([str(source), str(tmp_path / "*.jsonl")])
    with pytest.raises(ValueError, match="holds no tokenizer"):
        preprocess_files([source], tmp_path / "out", TokenizerSettings(folder=tmp_path))
    with pytest.raises(ValueError, match="at least 257"):
        train_tokenizer(["x"], 256)
    with pytest.raises(ValueError, match="either a tokenizer folder or"):
        TokenizerSettings()
    with pytest.raises(ValueError, match="--eod-token needs --tokenizer"):
        TokenizerSettings(train_vocab_size=300, eod_token="x")
    with pytest.raises(ValueError, match="--workers"):
        preprocess_files(
            [source], tmp_path / "out", TokenizerSettings(folder=tokenizer_dir), workers=0
        )


def test_overwrites_only_when_asked(tmp_path: Path, tokenizer_dir: Path) -> None:
    settings = TokenizerSettings(folder=tokenizer_dir)
    prefix = tmp_path / "corpus"
    preprocess_files([write_jsonl(tmp_path / "a.jsonl", ["one"])], prefix, settings)
    other = write_jsonl(tmp_path / "b.jsonl", ["two", "three"])
    with pytest.raises(ValueError, match="exists; give another output or --overwrite"):
        preprocess_files([other], prefix, settings)
    # The tokenizer beside the corpus may be the one to use.
    own = TokenizerSettings(folder=tokenizer_path(prefix))
    preprocess_files([other], prefix, own, overwrite=True)
    assert read_documents(prefix) == expected_documents(tokenizer_dir, ["two", "three"])


def test_every_interruption_leaves_a_whole_corpus_or_no_index(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stops at each rename and removal in turn, over an existing corpus."""
    settings = TokenizerSettings(folder=tokenizer_dir)
    old = write_jsonl(tmp_path / "old.jsonl", make_texts(5, seed=1))
    new = write_jsonl(tmp_path / "new.jsonl", make_texts(9, seed=2))
    whole = {
        count: expected_documents(tokenizer_dir, make_texts(count, seed=seed))
        for count, seed in ((5, 1), (9, 2))
    }
    outcomes = []
    for stop_at in range(20):
        prefix = tmp_path / str(stop_at) / "corpus"
        preprocess_files([old], prefix, settings)
        calls = 0

        def interrupted(name: str, original: object, limit: int = stop_at) -> object:
            def call(self: Path, *args: object, **kwargs: object) -> object:
                nonlocal calls
                calls += 1
                if calls > limit:
                    raise KeyboardInterrupt
                return original(self, *args, **kwargs)  # type: ignore[operator]

            return call

        with monkeypatch.context() as patch:
            for name in ("replace", "rename", "unlink"):
                patch.setattr(Path, name, interrupted(name, getattr(Path, name)))
            try:
                preprocess_files([new], prefix, settings, overwrite=True)
            except KeyboardInterrupt:
                finished = False
            else:
                finished = True
        if idx_path(prefix).exists():
            documents = read_documents(prefix)
            assert documents == whole[len(documents)]
            outcomes.append(len(documents))
        else:
            outcomes.append(0)
        assert not list(prefix.parent.glob(".corpus*"))
        if finished:
            break
    assert outcomes[0] == 5
    assert outcomes[-1] == 9
    assert set(outcomes[1:-1]) == {0}


def test_killed_process_leaves_no_index(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(100) * 2000)
    command = [sys.executable, "tools/preprocess_data.py", str(source)]
    command += ["--output", str(tmp_path / "corpus"), "--train-tokenizer", "300"]
    command += ["--train-megabytes", "0.01"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob(".corpus.building-*/corpus.bin")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(tmp_path.glob("corpus.*"))


def test_command_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two\n--\nthree\n--\n\n--\nfour", encoding="utf-8")
    command = [sys.executable, "tools/preprocess_data.py", str(tmp_path / "*.txt")]
    command += ["--output", str(tmp_path / "corpus"), "--train-tokenizer", "260"]
    command += ["--document-separator", r"\n--\n"]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "in 3 documents (1 empty ones skipped), vocabulary 260" in done.stdout
    assert "tokenizing: 0.0 of 0.0 MB" in done.stderr
    again = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert again.returncode == 2
    assert again.stderr.startswith("error: ")
    assert len(again.stderr.splitlines()) == 1
