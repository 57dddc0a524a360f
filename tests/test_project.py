"""The rules of the house, held: imports, no machine in the repository."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
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


def test_every_shipped_dependency_is_pinned() -> None:
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    block = text.split("dependencies = [", 1)[1].split("\n]", 1)[0]
    names = re.findall(r'^\s*"([^"]+)"', block, flags=re.MULTILINE)
    assert names
    assert all(re.search(r"[=<>]", name) for name in names), names
