"""What all tools have in common: who owns an output, and output that nobody reads."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mone_megatron.ownership import owned_folder, owned_path
from mone_megatron.testing.launch import REPOSITORY
from mone_megatron.testing.tools import load_tool

# Each tool that writes: what it is started with, OUT being its output.
FOLDERS = {
    "analyze_run": ("none", "--output", "OUT"),
    "compare_runs": ("none", "--output", "OUT"),
    "scaling_law": ("none.csv", "--output", "OUT"),
    "sparsify_hf": ("none", "--perplexity", "none", "--output", "OUT"),
    "study": ("OUT.yaml", "--report", "--output", "."),
}
NAMES = {
    "bench": ("select", "--output", "OUT"),
    "eval_hf": ("none", "--perplexity", "none", "--json", "OUT"),
    "export_hf": ("none", "--output", "OUT"),
    "import_hf": ("none", "--output", "OUT"),
    "plan": ("experiment=tiny_moe", "--json", "OUT"),
}
STUDY = """\
question: which
experiment: tiny_moe
overrides: [train.steps=1, train.eval_interval=1]
reference: a
variants: {a: [], b: [optim.lr=0.002]}
"""


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Standard output into a pipe whose reader has gone."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w", encoding="ascii") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        yield


def _refused(
    tool: str, arguments: tuple[str, ...], out: Path, capsys: pytest.CaptureFixture[str]
) -> str:
    words = [word.replace("OUT", str(out)) for word in arguments]
    assert load_tool(tool)(words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("tool", FOLDERS)
def test_a_folder_that_another_process_writes(
    tool: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    (tmp_path / "out.yaml").write_text(STUDY)
    with owned_folder("--output", out):
        told = _refused(tool, FOLDERS[tool], out, capsys)
    assert f" is in use by process {os.getpid()}" in told
    assert "--output: " in told
    assert not out.exists()


@pytest.mark.parametrize("tool", NAMES)
def test_a_name_that_another_process_writes(
    tool: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with owned_path("--output", out):
        told = _refused(tool, NAMES[tool], out, capsys)
    assert f"{out} is in use by process {os.getpid()}" in told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tool", [*FOLDERS, *NAMES])
def test_an_output_that_cannot_be(
    tool: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "out.yaml").write_text(STUDY)
    arguments = {**FOLDERS, **NAMES}[tool]
    if tool == "study":
        arguments = ("out.yaml", "--report", "--output", "OUT")
    told = _refused(tool, arguments, tmp_path / "file" / "out", capsys)
    assert "--output: " in told or "--json: " in told
    assert str(tmp_path / "file") in told


@pytest.mark.parametrize("tool", sorted(path.stem for path in REPOSITORY.glob("tools/*.py")))
def test_help_that_nobody_reads(tool: str, nobody: None, capfd: pytest.CaptureFixture[str]) -> None:
    if tool == "dependencies":
        pytest.skip("is run before our packages are there")
    with pytest.raises(SystemExit) as ended:
        load_tool(tool)(["--help"])
    assert ended.value.code == 0
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("tool", ["plan", "study"])
def test_a_result_that_nobody_reads(
    tool: str, nobody: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The one leaves a file all the same, the other only prints; both end well, and quietly."""
    result = tmp_path / "plan.json"
    arguments = {"plan": ["experiment=tiny_moe", "--json", str(result)], "study": ["--list"]}
    assert load_tool(tool)(arguments[tool]) == 0
    if tool == "plan":
        assert json.loads(result.read_text())
    assert capfd.readouterr().err == ""


def test_a_full_disk_under_what_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = tmp_path / "plan.json"
    with open("/dev/full", "w", encoding="ascii") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert load_tool("plan")(["experiment=tiny_moe", "--json", str(result)]) == 0
    assert json.loads(result.read_text())
