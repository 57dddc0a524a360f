"""The tests that belong to a change, in a small repository of its own."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from mone_megatron.testing.changed_tests import (
    belonging_tests,
    changed_files,
    imported_modules,
    main,
)
from mone_megatron.testing.launch import REPOSITORY
from mone_megatron.testing.warm_start import run_python

FILES = {
    "mone_megatron/train/loop.py": "",
    "mone_megatron/train/hooks/report.py": "",
    "mone_megatron/data/lines.py": "",
    "mone_megatron/report/page.css": "",
    "mone_megatron/display.py": "",
    "mone_megatron/commands/plan.py": "",
    "tools/plan.py": "",
    "conf/model/moe.yaml": "",
    "docs/gpu.md": "",
    "tests/config/test_load.py": "import mone_megatron.config\n",
    "tests/train/helpers.py": "",
    "tests/train/test_loop.py": "from mone_megatron.train.loop import train\nimport helpers\n",
    "tests/train/test_step.py": "from mone_megatron.train import step\n",
    "tests/report/test_page.py": "from mone_megatron.train.hooks import (\n    a, report,\n)\n",
    "tests/data/test_lines.py": "import mone_megatron.data.lines as lines\n",
    "tests/planning/test_tool.py": "TOOL = 'tools/plan.py'\n",
    "tests/planning/test_plans.py": "plan = load_tool('plan')\n",
    "tests/planning/test_words.py": "# Not how planning is planned.\n",
    "tests/hf/test_pages.py": "PAGE = ROOT / 'docs' / 'gpu.md'\n",
    "tests/hf/test_card.py": "PAGES = ROOT / 'docs'\n",
    "tests/test_docs.py": "",
    "tests/test_display.py": "",
}


def git(folder: Path, *arguments: str) -> None:
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main")
    subprocess.run(["git", *who, "-C", str(folder), *arguments], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "all")
    git(tmp_path, "checkout", "-b", "work")
    return tmp_path


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (
            ["mone_megatron/train/loop.py"],
            ["tests/train/test_loop.py", "tests/train/test_step.py"],
        ),
        (
            ["mone_megatron/train/hooks/report.py"],
            ["tests/report/test_page.py", "tests/train/test_loop.py", "tests/train/test_step.py"],
        ),
        (["mone_megatron/data/lines.py"], ["tests/data/test_lines.py"]),
        (["tests/train/helpers.py"], ["tests/train/test_loop.py"]),
        (["tests/train/conftest.py"], ["tests/train/test_loop.py", "tests/train/test_step.py"]),
        (["tools/plan.py"], ["tests/planning/test_plans.py", "tests/planning/test_tool.py"]),
        (
            ["mone_megatron/commands/plan.py"],
            ["tests/planning/test_plans.py", "tests/planning/test_tool.py"],
        ),
        # What is no Python: by its name, by the tests named for its folder, and by the folder's.
        (
            ["docs/gpu.md"],
            ["tests/hf/test_pages.py", "tests/test_docs.py", "tests/hf/test_card.py"],
        ),
        (["mone_megatron/report/page.css"], ["tests/report/test_page.py"]),
        (["conf/model/moe.yaml"], ["tests/config/test_load.py"]),
        (["mone_megatron/display.py"], ["tests/test_display.py"]),
        (
            ["tests/train/test_step.py", "mone_megatron/data/lines.py"],
            ["tests/train/test_step.py", "tests/data/test_lines.py"],
        ),
        ([], ["tests/config/test_load.py"]),
        (["README.md"], ["tests/config/test_load.py"]),
    ],
)
def test_what_belongs_to_a_change_comes_closest_first(
    repository: Path, changed: list[str], expected: list[str]
) -> None:
    assert belonging_tests(repository, changed) == expected


def _commit(folder: Path) -> None:
    (folder / "mone_megatron/data/lines.py").write_text("changed = True\n")
    git(folder, "commit", "-am", "lines")


def _edit(folder: Path) -> None:
    (folder / "mone_megatron/data/lines.py").write_text("changed = True\n")


def _add(folder: Path) -> None:
    (folder / "mone_megatron/data/new.py").write_text("")


def _remove(folder: Path) -> None:
    (folder / "mone_megatron/data/lines.py").unlink()


@pytest.mark.parametrize(
    ("change", "file"),
    [
        (_commit, "mone_megatron/data/lines.py"),
        (_edit, "mone_megatron/data/lines.py"),
        (_add, "mone_megatron/data/new.py"),
        (_remove, "mone_megatron/data/lines.py"),
        (lambda folder: None, None),
    ],
)
def test_every_kind_of_change_is_seen(
    repository: Path, change: Callable[[Path], None], file: str | None
) -> None:
    change(repository)
    # Of another branch, and of no concern.
    assert changed_files(repository, "main") == ([file] if file else [])
    if change is not _commit:
        assert changed_files(repository, "no_such_branch") == ([file] if file else [])


def test_what_git_refuses_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr("mone_megatron.testing.changed_tests.REPOSITORY", tmp_path)
    assert main(["main"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: git diff --name-only HEAD: ")
    assert said.count("\n") == 1


def test_imports_are_found_in_every_form() -> None:
    source = "import a.b\nfrom c import d as e, f\nfrom g.h import (\n    i,  # why\n    j,\n)\n"
    assert {"a.b", "c.d", "c.f", "g.h.j", "g.h"} <= imported_modules(source)


def test_the_longest_files_are_left_out_unless_there_are_no_others() -> None:
    """As ``make check`` calls pytest; it fails where pytest finds no test at all."""

    def collected(*files: str) -> set[str]:
        arguments = ["-m", "pytest", "--within", "50", "--collect-only", "-p", "no:cacheprovider"]
        done = run_python([*arguments, *files], folder=REPOSITORY, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return {line.partition(":")[0] for line in done.stdout.splitlines() if "::" in line}

    long, short = "tests/faults/test_kills.py", "tests/test_counting.py"
    assert collected(long, short) == {short}
    assert collected(long) == {long}
