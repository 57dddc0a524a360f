"""What all tools have in common: who owns an output, and output that nobody reads."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from mone_megatron.command_line import print_error
from mone_megatron.commands import mone
from mone_megatron.ownership import owned_folder, owned_path
from mone_megatron.testing.launch import REPOSITORY
from mone_megatron.testing.tools import load_tool

# Each tool that writes: what it is started with, OUT being its output.
FOLDERS = {
    "analyze_run": ("none", "--output", "OUT"),
    "compare_runs": ("none", "--output", "OUT"),
    "scaling_law": ("none.csv", "--output", "OUT"),
    "sparsify_hf": ("none", "--perplexity", "none", "--output", "OUT"),
    "study": ("OUT.yaml", "--output", "."),
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
        arguments = ("out.yaml", "--output", "OUT")
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


def _mone(name: str, arguments: list[str]) -> int:
    return mone.main([name, *arguments])


COMMAND_LINES: dict[str, Callable[[list[str]], int]] = {
    **{f"mone {name}": partial(_mone, name) for name in mone.COMMANDS},
    **{path.stem: load_tool(path.stem) for path in sorted(REPOSITORY.glob("tools/*.py"))},
}


@pytest.mark.parametrize("wrong", ["--no-such-option", "--no-such-option=3"])
@pytest.mark.parametrize("name", COMMAND_LINES)
def test_an_option_that_is_none_is_one_line(
    name: str, wrong: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [name])
    try:
        status: object = COMMAND_LINES[name]([wrong])
    except SystemExit as ended:
        status = ended.code
    shown = capsys.readouterr()
    (line,) = shown.err.splitlines()
    assert (status, shown.out) == (2, "")
    assert line.startswith("error: ")
    assert "error: " not in line.removeprefix("error: ")


def test_an_option_is_named_with_where_its_help_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        load_tool("bench")(["train", "--steps", "many"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --steps: 'many' is no whole number; see ")
    assert line.endswith(" train --help")


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["run", "--output", ""], "--output"),
        (["run", "--output="], "--output"),
        (["", "--output", "out"], "an argument"),
        (["--output=out", ""], "an argument"),
    ],
)
@pytest.mark.parametrize("tool", ["compare_runs", "export_hf", "analyze_run", "scaling_law"])
def test_a_variable_of_the_shell_that_is_not_set_is_told(
    tool: str, arguments: list[str], option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it stood for was the folder that the shell is in."""
    with pytest.raises(SystemExit, match="2"):
        load_tool(tool)(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {option}: is empty; is a variable of the shell not set?; see ")


def test_every_line_of_an_error_says_that_it_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    print_error("one\ntwo")
    print_error("")
    assert capsys.readouterr().err == "error: one\nerror: two\nerror: \n"
