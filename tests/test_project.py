"""The rules of the house, held: imports, no machine in the repository."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mone_megatron.testing.launch import import_path

REPOSITORY = Path(__file__).resolve().parents[1]
# Tests of processes that find another path on purpose: vLLM's, none of ours, all of sys.path.
OTHER_PATHS = (
    *("serving", "test_warm_start.py", "test_side_environment.py"),
    "test_megatron_compat.py",
)
TEXT = {".py", ".md", ".yaml", ".toml", ".sh", ".sbatch", ".cfg", ""}


def _files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    files = [REPOSITORY / name for name in listed]
    return [path for path in files if path.suffix in TEXT and path.is_file()]


def test_import_rules() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_no_machine_path_or_registry_in_the_repository() -> None:
    # Spelt in pieces so that this file does not match itself.
    pattern = re.compile(r"/(?:work|root|home)" + r"/\w|index-" + r"url|\bpypi\." + r"\w")
    found = [
        f"{path.relative_to(REPOSITORY)}:{number}: {line.strip()}"
        for path in _files()
        for number, line in enumerate(
            path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1
        )
        if pattern.search(line)
    ]
    assert not found, "\n".join(found)


def test_processes_that_tests_start_import_what_the_tests_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the suite on another megatron-core would start processes with the installed one."""
    pattern = re.compile(r'"PYTHON' + r'PATH"(: |, )')
    found = [
        f"{path.relative_to(REPOSITORY)}: {line.strip()}; use import_path"
        for path in (REPOSITORY / "tests").rglob("*.py")
        if not {path.name, path.parent.name} & set(OTHER_PATHS)
        for line in path.read_text(encoding="utf-8").splitlines()
        if pattern.search(line) and "import_path(" not in line and ".get(" not in line
    ]
    assert not found, "\n".join(found)
    name = "PYTHON" + "PATH"
    monkeypatch.setenv(name, os.pathsep.join(["one", "two"]))
    assert import_path(tmp_path).split(os.pathsep) == [str(tmp_path), "one", "two"]
    monkeypatch.delenv(name)
    assert import_path(tmp_path) == str(tmp_path)


def test_every_shipped_dependency_is_pinned() -> None:
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    block = text.split("dependencies = [", 1)[1].split("\n]", 1)[0]
    names = re.findall(r'^\s*"([^"]+)"', block, flags=re.MULTILINE)
    assert names
    assert all(re.search(r"[=<>]", name) for name in names), names
