"""Folders of Hugging Face datasets as inputs, and the keys of the text by file."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mone_megatron.data.documents import DocumentReader, InputSettings, expand_inputs
from mone_megatron.data.indexed import bin_path, read_index
from mone_megatron.data.sidecar import read_sidecar
from mone_megatron.data.text_keys import TextKeys, parse_keys
from mone_megatron.testing.tools import load_tool

from .conftest import make_texts, write_jsonl

TEXTS = make_texts(25)


def read(*inputs: object, split: str | None = None, **settings: object) -> list[str]:
    chosen = InputSettings(**settings)  # type: ignore[arg-type]
    reader = DocumentReader(chosen)
    files = expand_inputs([str(name) for name in inputs], split)
    return [document.text for path in files for document in reader.read(path)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of three files, and a dictionary of two."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    folder = tmp_path_factory.mktemp("saved")
    whole = datasets.Dataset.from_dict({"n": list(range(25)), "text": TEXTS})
    # A selection in another order: what is saved is what it shows.
    whole.select(range(24, -1, -1)).save_to_disk(str(folder / "one"), num_shards=3)
    parts = {"train": whole.select(range(20)), "test": whole.select(range(20, 25))}
    datasets.DatasetDict(parts).save_to_disk(str(folder / "two"))
    datasets.DatasetDict(train=whole).save_to_disk(str(folder / "only"))
    return folder


def test_saved_datasets(saved: Path) -> None:
    assert read(saved / "one") == TEXTS[::-1]
    assert len(list((saved / "one").glob("*.arrow"))) == 3
    assert read(saved / "two", split="train") == TEXTS[:20]
    assert read(saved / "two", split="test") == TEXTS[20:]
    assert read(saved / "two" / "test") == TEXTS[20:]
    assert read(saved / "only") == TEXTS
    # A file of one is an input, too.
    first = saved / "one" / "data-00000-of-00003.arrow"
    assert read(first) == TEXTS[::-1][: len(read(first))]


def parquet(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": texts}), path)


def test_folders_of_parquet(tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    parquet(hub / "data" / "train-00001-of-00002.parquet", ["b"])
    parquet(hub / "data" / "train-00000-of-00002.parquet", ["a"])
    parquet(hub / "data" / "my_held_out-00000-of-00001-0123456789abcdef.parquet", ["c"])
    parquet(hub / ".cache" / "train-00000-of-00001.parquet", ["hidden"])
    assert read(hub, split="train") == ["a", "b"]
    assert read(hub, split="my_held_out") == ["c"]
    with pytest.raises(ValueError, match=r"splits my_held_out, train; choose one with --split"):
        read(hub)
    folders = tmp_path / "folders"
    parquet(folders / "train" / "x.parquet", ["d"])
    parquet(folders / "validation.parquet", ["e"])
    assert read(folders, split="train") == ["d"]
    assert read(folders, split="validation") == ["e"]
    parquet(tmp_path / "plain" / "b.parquet", ["g"])
    parquet(tmp_path / "plain" / "a.parquet", ["f"])
    assert read(tmp_path / "plain") == ["f", "g"]
    with pytest.raises(ValueError, match=r"train is no split of .*plain; its files name none"):
        read(tmp_path / "plain", split="train")


def test_files_and_streams_of_arrow(tmp_path: Path) -> None:
    table = pa.table({"text": ["a", None, "c"], "other": [1, 2, 3]})
    for name, opened in (("f.arrow", pa.ipc.new_file), ("s.arrow", pa.ipc.new_stream)):
        with opened(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
        assert read(tmp_path / name) == ["a", "", "c"]
        with pytest.raises(ValueError, match=r"no column 'body' \(columns: 'text', 'other'\)"):
            read(tmp_path / name, column="body")
        with pytest.raises(ValueError, match="column 'other' holds int64, not strings"):
            read(tmp_path / name, column="other")
    content = (tmp_path / "s.arrow").read_bytes()
    (tmp_path / "cut.arrow").write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(ValueError, match=r"cut.arrow: is damaged after row \d"):
        read(tmp_path / "cut.arrow")
    (tmp_path / "no.arrow").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"no.arrow is not an Arrow file"):
        read(tmp_path / "no.arrow")


def test_datasets_that_cannot_be_read(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"two: has the splits train, test; choose one with --spl"):
        read(saved / "two")
    with pytest.raises(ValueError, match=r"--split: dev is no split of .*; there is train, test"):
        read(saved / "two", split="dev")
    with pytest.raises(ValueError, match="no input is the folder of a dataset"):
        read(write_jsonl(tmp_path / "a.jsonl", ["x"]), split="train")
    shutil.copytree(saved / "one", tmp_path / "cut")
    (tmp_path / "cut" / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(ValueError, match=r"data-00001-of-00003.arrow: is missing, and .*lists"):
        read(tmp_path / "cut")
    (tmp_path / "cut" / "state.json").write_text("{")
    with pytest.raises(ValueError, match=r"state.json: cannot be read .*; save the dataset again"):
        read(tmp_path / "cut")
    (tmp_path / "cut" / "state.json").write_text('{"_data_files": [], "_indices_data_files": [1]}')
    with pytest.raises(ValueError, match="an index chooses its rows"):
        read(tmp_path / "cut")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is a folder, and no dataset; name its files"):
        read(tmp_path / "empty")


def test_keys_by_pattern() -> None:
    keys = parse_keys("--json-key", ["body", "code/*.jsonl=content", "code/new.jsonl=t", "hf=x"])
    assert keys.of(Path("/data/code/a.jsonl")) == "content"
    assert keys.of(Path("code/new.jsonl")) == "t"
    assert keys.of(Path("sets/hf/data/train-00000-of-00001.parquet")) == "x"
    assert keys.of(Path("web.jsonl")) == "body"
    # A pattern may hold "=", as folders of partitions do.
    assert parse_keys("--column", ["lang=en/*.parquet=page"]).by_pattern == (
        ("lang=en/*.parquet", "page"),
    )
    assert parse_keys("--column", []) == TextKeys()


@pytest.mark.parametrize("given", [["=x"], ["x="], [""], ["a", "b"]], ids=str)
def test_keys_that_say_nothing(given: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^--json-key: "):
        parse_keys("--json-key", given)


def test_one_command_reads_all_of_it(
    saved: Path, tmp_path: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code").mkdir()
    write_jsonl(tmp_path / "web.jsonl", ["one"], "body")
    line = json.dumps({"content": "zwei é"}, ensure_ascii=False)
    (tmp_path / "code" / "a.jsonl").write_bytes(line.encode("cp1252"))
    pq.write_table(pa.table({"page": ["three"]}), tmp_path / "b.parquet")
    os.symlink(saved, tmp_path / "sets")
    tool = load_tool("preprocess_data")
    inputs = ["web.jsonl", "code/*.jsonl", "b.parquet", "sets/two"]
    keys = ["--json-key", "body", "--json-key", "code/*.jsonl=content", "--column", "b.*=page"]
    rest = ["--encoding", "cp1252", "--split", "test", "--tokenizer", str(tokenizer_dir)]
    assert tool([*inputs, *keys, *rest, "--output", "corpus"]) == 0
    write_jsonl(tmp_path / "all.jsonl", ["one", "zwei é", "three", *TEXTS[20:]])
    assert tool(["all.jsonl", "--output", "expected", "--tokenizer", str(tokenizer_dir)]) == 0
    found, expected = (
        np.fromfile(bin_path(Path(name)), read_index(Path(name)).dtype).tolist()
        for name in ("corpus", "expected")
    )
    assert found == expected
    sidecar = read_sidecar(Path("corpus"))
    assert sidecar is not None
    assert sidecar.reading is not None
    assert sidecar.reading["encoding"] == "cp1252"
    assert sidecar.reading["split"] == "test"
    assert sidecar.reading["files"] == 4
    assert sidecar.reading["json_key"]["by_pattern"] == [["code/*.jsonl", "content"]]
    capsys.readouterr()
    for wrong, message in (
        (["--json-key", "cod/*=x"], "error: --json-key cod/*=x: cod/* matches no input of JSON"),
        (["--json-key", "b.parquet=x"], "error: --json-key b.parquet=x: b.parquet matches no inp"),
        (["--column", "web.jsonl=x"], "error: --column web.jsonl=x: web.jsonl matches no input of"),
        (["--encoding", "klingon"], "error: --encoding: 'klingon' is no encoding"),
    ):
        given = [*inputs, "--split", "test", *wrong, "--tokenizer", str(tokenizer_dir)]
        assert tool([*given, "--output", "refused"]) == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert said.startswith(message)
    given = ["b.parquet", "--json-key", "page", "--tokenizer", str(tokenizer_dir)]
    assert tool([*given, "--output", "refused"]) == 2
    said = capsys.readouterr().err
    assert said == "error: --json-key page: no input is JSON lines; --column is for the others\n"
    assert not list(tmp_path.glob("*refused*"))
