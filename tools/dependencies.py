"""Print the project's dependencies, one a line, without those that are there already.

For images whose torch must not be replaced (Dockerfile). Needs nothing but Python 3.11 or newer.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import tomllib


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as mone_megatron.command_line.Parser does."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message.removeprefix('argument ')}; see {self.prog} --help\n")


def requirements(project: Path, without: Sequence[str]) -> list[str]:
    """The requirements of a pyproject.toml but those of the packages ``without``.

    Raises:
        ValueError: one of ``without`` is not a dependency.
    """
    listed = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
    names = [re.split(r"[<>=!~ \[;]", line, maxsplit=1)[0] for line in listed]
    if unknown := sorted(set(without) - set(names)):
        raise ValueError(f"--without: {', '.join(unknown)} not in {project}: {', '.join(names)}")
    return [line for line, name in zip(listed, names, strict=True) if name not in without]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = _Parser(description=__doc__)
    parser.add_argument("project", type=Path, metavar="pyproject.toml")
    parser.add_argument("--without", nargs="+", default=[], metavar="PACKAGE")
    options = parser.parse_args(arguments)
    try:
        print("\n".join(requirements(options.project, options.without)))
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
