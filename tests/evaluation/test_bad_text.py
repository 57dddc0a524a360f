"""Text that cannot be read is named in one line by every tool that reads it for a model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mone_megatron.testing.tools import load_tool

GOOD = json.dumps({"text": "def f(x): return x + 1\n" * 20})
# Name -> (content, how it is named).
FILES = {
    "half.jsonl": (f'{GOOD}\n{{"text": "\\ud83d"}}\n', "half.jsonl:2: 'text' holds half"),
    "nan.jsonl": (f'{{"text": "x", "n": NaN}}\n{GOOD}\n', "nan.jsonl:1: invalid JSON"),
    "row.parquet": (None, "row.parquet: row group 0, row 1: column 'text' is not UTF-8"),
}


@pytest.fixture
def bad(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    content, message = FILES[request.param]
    path = tmp_path / request.param
    if content is None:
        rows = [json.loads(GOOD)["text"].encode(), b"\xff", None]
        texts = pa.array(rows, pa.binary()).cast(pa.string(), safe=False)
        pq.write_table(pa.table({"text": texts}), path)
    else:
        path.write_text(content)
    return path, message


def arguments_of(tool: str, model: Path, text: Path, output: Path) -> list[str]:
    return {
        "eval_hf": [str(model), "--perplexity", str(text), "--max-tokens", "64"],
        "sparsify_hf": [
            str(model), "--perplexity", str(text), "--output", str(output), "--shares", "0", "0.5",
            "--max-tokens", "64",
        ],
        "analyze_run": [
            str(model), "--text", str(text), "--output", str(output), "--max-tokens", "64",
        ],
    }[tool]  # fmt: skip


@pytest.mark.parametrize("tool", ["eval_hf", "sparsify_hf", "analyze_run"])
@pytest.mark.parametrize("bad", FILES, indirect=True)
def test_a_bad_record_is_named(
    tool: str,
    bad: tuple[Path, str],
    models: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, message = bad
    assert load_tool(tool)(arguments_of(tool, models[0], path, tmp_path / "out")) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert message in line
    assert "--on-error skip" in line


@pytest.mark.parametrize("tool", ["eval_hf", "sparsify_hf", "analyze_run"])
@pytest.mark.parametrize("bad", ["half.jsonl"], indirect=True)
def test_it_is_skipped_and_counted(
    tool: str,
    bad: tuple[Path, str],
    models: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, message = bad
    given = arguments_of(tool, models[0], path, tmp_path / "out")
    assert load_tool(tool)([*given, "--on-error", "skip"]) == 0
    shown = capsys.readouterr()
    assert shown.err.count("1 bad record skipped; the first: ") == 1
    assert message in shown.err
    assert "texts begin without BOS" in shown.out


def test_separators_split_and_are_told(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\r\n==\ntwo\n==\n \n==\nthree")
    given = [str(models[0]), "--perplexity", str(path), "--json", str(tmp_path / "out.json")]
    tokens = {}
    for separator in (r"\n==\n", r"\n=\n"):
        assert load_tool("eval_hf")([*given, "--document-separator", separator]) == 0
        told = "is in none of 1 text files" in capsys.readouterr().err
        assert told == (separator == r"\n=\n")
        (result,) = json.loads((tmp_path / "out.json").read_text())["models"]
        tokens[separator] = result["corpora"][0]["bytes"]
    assert tokens == {r"\n==\n": len("one\rtwothree"), r"\n=\n": path.stat().st_size}
    assert load_tool("eval_hf")([*given, "--document-separator", r"\x"]) == 2
    assert r"--document-separator: \x needs 2 hexadecimal" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", [["--format", "text"], ["--document-separator", "x"], ["--on-error", "skip"]]
)
def test_options_without_files_are_refused(
    option: list[str],
    models: tuple[Path, Path],
    example_tasks: list[Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [str(models[0]), "--tasks", str(example_tasks[0]), *option]
    assert load_tool("eval_hf")(given) == 2
    assert f"{option[0]}: says how files of text are read" in capsys.readouterr().err


def test_prompts_are_named_by_line(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_bytes(b"\xef\xbb\xbfone\r\n \n\xff\n")
    given = [str(models[0]), "--max-new-tokens", "1"]
    assert load_tool("generate")([*given, "--prompts", str(prompts)]) == 2
    assert f"error: --prompts: {prompts}:3: not UTF-8" in capsys.readouterr().err
    # A line ends where a line of every other file ends.
    prompts.write_bytes("\ufeffone\r\n \ntwo\u2028three\x0cfour".encode())
    assert load_tool("generate")([*given, "--prompts", str(prompts)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("--- 1\none")
    assert "--- 2\ntwo\u2028three\x0cfour" in shown
    assert "--- 3" not in shown
    argument = os.fsdecode(b"caf\xe9")
    assert load_tool("generate")([*given, "--prompt", argument]) == 2
    assert "error: --prompt: is not UTF-8" in capsys.readouterr().err
