"""The tutorials are followed word for word: what they say is written, and what they run is run.

In a tutorial a block whose first comment names a file is that file; blocks in
``sh`` are commands, run at the root of the repository in their order. Blocks in ``console`` are
what a reader does once for a machine (install, open a page); ``text`` is output.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from repository_copy import copy_repository

from mone_megatron.commands.mone import COMMANDS
from mone_megatron.config.load import compose
from mone_megatron.testing.launch import REPOSITORY

TUTORIALS = sorted((REPOSITORY / "docs" / "tutorials").glob("*.md"))
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# Hydra reads `# @package` in the first line only.
_FILE = re.compile(r"(?:# @package _global_\n)?# ((?!@)\S+\.(?:py|yaml|toml|env))\n")
_INSTALL = re.compile(r"^\$ pip install -e (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Step:
    """One block of a tutorial: a file to write, a package to install, or commands to run."""

    text: str
    file: str | None = None
    package: str | None = None


def steps(page: Path) -> list[Step]:
    """Returns what a reader of the page does, in order."""
    found = []
    for language, text in _BLOCK.findall(page.read_text(encoding="utf-8")):
        name = _FILE.match(text)
        if name is not None:
            found.append(Step(text, file=name[1]))
        elif language == "sh":
            found.append(Step(text))
        elif language == "console":
            found += [Step(text, package=package) for package in _INSTALL.findall(text)]
    return found


def _commands(page: Path) -> list[list[str]]:
    text = "".join(step.text for step in steps(page) if not (step.file or step.package))
    return [shlex.split(line) for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def test_there_is_a_tutorial_of_each_first_thing() -> None:
    names = {page.stem for page in TUTORIALS}
    assert {"first-run", "first-ablation", "own-data", "own-method", "own-cluster"} <= names
    assert all(len(steps(page)) >= 2 for page in TUTORIALS)


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_what_a_tutorial_names_exists(page: Path) -> None:
    written = {step.file for step in steps(page) if step.file}
    for command in _commands(page):
        for word in command:
            if re.fullmatch(r"(tools|launch|tests)/[\w./]+", word):
                assert word in written or (REPOSITORY / word).exists(), word
        if command[0] == "mone":
            assert command[1] in COMMANDS, command
        if command[:2] == ["mone", "train"]:
            overrides = [word for word in command if "=" in word and not word.startswith("-")]
            experiments = {word.removeprefix("experiment=") for word in overrides}
            # What is refused on purpose ends in ||; a package's methods are there once it is.
            refused = "||" in command or any(step.package for step in steps(page))
            own = {f"conf/experiment/{name}.yaml" for name in experiments} & written
            if not refused and not own:
                # A sweep's values are composed one by one; the first of each will do.
                compose([re.sub(r"=([^\[,'$]+),.*", r"=\1", word) for word in overrides])


def _install(package: Path) -> None:
    """Does what ``pip install -e`` would, beside the package instead of into this environment."""
    text = (package / "pyproject.toml").read_text(encoding="utf-8")
    entries = re.search(r"\[project\.entry-points\.\"(.*?)\"\]\n(.*?)\n\n", text, re.DOTALL)
    assert entries is not None
    info = package / "tutorial-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tutorial\nVersion: 1.0\n")
    lines = entries[2].replace('"', "")
    (info / "entry_points.txt").write_text(f"[{entries[1]}]\n{lines}\n")


def follow(page: Path, folder: Path) -> str:
    """Does what the page says in a fresh copy of the repository, and returns all output."""
    environment = copy_repository(folder)
    output = ""
    for step in steps(page):
        if step.file is not None:
            path = folder / step.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(step.text, encoding="utf-8")
            continue
        if step.package is not None:
            _install(folder / step.package)
            environment["PYTHONPATH"] += os.pathsep + str(folder / step.package)
            continue
        run = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", step.text],
            cwd=folder, env=environment, text=True, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        output += f"$ {step.text}{run.stdout}"
        assert run.returncode == 0, output
    return output


@pytest.mark.slow
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorial_can_be_followed(page: Path, tmp_path: Path) -> None:
    output = follow(page, tmp_path)
    # What a page shows in words that do not depend on the machine comes out of its commands.
    text = page.read_text(encoding="utf-8")
    for shown in re.findall(r"^```text\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        for line in shown.splitlines():
            if line.startswith(("error:", "exit status", "wrote", "Comparable", "report:")):
                assert line in output, line
