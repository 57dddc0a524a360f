"""Chooses the tests that belong to what was changed: ``make check`` runs them.

    python -m mone_megatron.testing.changed_tests [BASE]

prints test files, those that belong most closely first. What was changed is told by git: commits
since BASE (main), what is not committed, and files that are new. A test file belongs to a change
of itself or of a helper beside it, to one of a module that it imports, of a command that it names,
and of the part of the package that its folder is named for. Of what is no Python (docs/, conf/) it
belongs to the files and the folders that it names. Where none belongs, they are those of the core.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from mone_megatron.command_line import USAGE_EXIT_CODE, print_error
from mone_megatron.testing.launch import REPOSITORY

PACKAGE = "mone_megatron"
# Where the command lines are: a test names one by its file's name alone.
_COMMANDS = ("tools/", "launch/", f"{PACKAGE}/commands/")
# The part of the package that reads a folder beside it, where they have different names.
_READ_BY = {"conf": "config"}
# Tests that are run when none belongs to what was changed.
CORE = ("tests/config", "tests/methods/test_registries.py", "tests/kernels/test_topk_mask.py")


def _git(repository: Path, *arguments: str) -> list[str]:
    done = subprocess.run(
        ["git", "-C", str(repository), *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        why = (done.stderr.strip() or "it failed").splitlines()[-1]
        raise ValueError(f"git {' '.join(arguments)}: {why}")
    return done.stdout.splitlines()


def changed_files(repository: Path, base: str) -> list[str]:
    """Returns the files that differ from where this version left ``base``, and the new ones.

    Args:
        repository: the folder of the git repository.
        base: a commit or branch; one that is not there, as in a shallow clone, stands for HEAD.

    Returns:
        Paths from the repository's folder, sorted; files that are gone among them.

    Raises:
        ValueError: git refuses, for instance since the folder is no repository.
    """
    try:
        (since,) = _git(repository, "merge-base", base, "HEAD")
    except ValueError:
        since = "HEAD"
    found = _git(repository, "diff", "--name-only", since)
    new = _git(repository, "ls-files", "--others", "--exclude-standard")
    return sorted({*found, *new})


def imported_modules(source: str) -> set[str]:
    """Returns the names of all modules that Python source may import, with too many at worst."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def _module(path: str) -> str:
    """Returns the name under which a file of the package is imported."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _names(text: str, names: Iterable[str]) -> bool:
    """Returns whether a test's source names a file, folder or command, in quotes or in a path."""
    return any(re.search(rf"""["'/ ]{re.escape(name)}(\.py|\.sh)?["'/ ]""", text) for name in names)


class _Change:
    """Knows what was changed, in the words in which tests name it."""

    def __init__(self, changed: Sequence[str], tests: Sequence[str]) -> None:
        code = [path for path in changed if path.startswith(f"{PACKAGE}/")]
        others = [path for path in changed if not path.startswith((f"{PACKAGE}/", "tests/"))]
        self.files = set(changed)
        self.helpers = [path for path in changed if path.startswith("tests/") and path not in tests]
        self.modules = {_module(path) for path in code if path.endswith(".py")}
        self.folders = {Path(path).parts[0] for path in others if len(Path(path).parts) > 1}
        # The folders of tests, or the files in tests/, that are named for what was changed.
        self.parts = {Path(path).parts[1].removesuffix(".py") for path in code}
        self.parts |= {_READ_BY.get(folder, folder) for folder in self.folders}
        self.commands = {Path(path).stem for path in changed if path.startswith(_COMMANDS)}
        self.names = {Path(path).name for path in others} - {f"{name}.py" for name in self.commands}

    def distance(self, path: str, text: str) -> int | None:
        """Returns how far a test file is from it: 0 is the change itself, None not concerned."""
        imports = imported_modules(text)
        if path in self.files:
            return 0
        # tests/NAME/ and tests/test_NAME.py.
        part = Path(path).parts[1].removeprefix("test_").removesuffix(".py")
        its_own = path == f"tests/test_{part}.py" and part in self.parts
        if imports & self.modules or its_own or _names(text, self.commands | self.names):
            return 1
        if any(_helps(helper, path, imports) for helper in self.helpers):
            return 1
        # Nearly all tests of commands name tools/, whichever they are of.
        return 2 if part in self.parts or _names(text, self.folders - {"tools"}) else None


def _helps(helper: str, test: str, imports: set[str]) -> bool:
    beside = Path(helper).parent == Path(test).parent
    return beside and (Path(helper).stem in imports or helper.endswith("conftest.py"))


def belonging_tests(repository: Path, changed: Sequence[str]) -> list[str]:
    """Returns the test files that belong to changed files, the closest first; paths as those.

    Args:
        repository: the folder of the git repository.
        changed: paths from there.
    """
    files = sorted(str(path.relative_to(repository)) for path in repository.glob("tests/**/*.py"))
    tests = [path for path in files if Path(path).name.startswith("test_")]
    change = _Change(changed, tests)
    found: list[tuple[int, str]] = []
    for path in tests:
        distance = change.distance(path, (repository / path).read_text(encoding="utf-8"))
        if distance is not None:
            found.append((distance, path))
    return [path for _, path in sorted(found)] or [path for path in tests if path.startswith(CORE)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status: 0, or 2 when git refuses."""
    base, *_ = [*(sys.argv[1:] if arguments is None else arguments), "main"]
    try:
        changed = changed_files(REPOSITORY, base)
    except ValueError as error:
        print_error(str(error))
        return USAGE_EXIT_CODE
    print("\n".join(belonging_tests(REPOSITORY, changed)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
