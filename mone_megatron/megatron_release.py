"""Tells which megatron-core is installed, by its files, without importing it or torch."""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path

# The releases that this project is tested with: pyproject.toml installs the first for Python 3.10
# and 3.11 and the second for later ones.
OLDEST = (0, 16, 1)
NEWEST = (0, 19)
# Releases that train something else without a word, and how.
_REFUSED = dict.fromkeys(
    ((0, 17), (0, 18)),
    "it reduces the gradients of expert weights over the wrong ranks where parallel.expert_tensor "
    "differs from parallel.tensor, without an error (mended in 0.19.0)",
)
_USE = "install megatron-core 0.16.1 (Python 3.10 and 3.11) or 0.19.2 (3.12)"

Release = tuple[int, int, int]


@cache
def megatron_folder() -> Path:
    """Returns the folder ``megatron/core`` that an import would take.

    Raises:
        ValueError: when megatron-core is not installed.
    """
    found = importlib.util.find_spec("megatron")
    for place in (found.submodule_search_locations or ()) if found else ():
        folder = Path(place) / "core"
        if (folder / "package_info.py").is_file():
            return folder
    raise ValueError(f"megatron-core is not installed; {_USE}")


@cache
def megatron_release() -> Release:
    """Returns the installed megatron-core's major, minor and patch number.

    Raises:
        ValueError: when it is not installed, or does not say its number.
    """
    path = megatron_folder() / "package_info.py"
    numbers: dict[str, int] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            for target in node.targets:
                if isinstance(target, ast.Name) and isinstance(node.value.value, int):
                    numbers[target.id] = node.value.value
    try:
        return numbers["MAJOR"], numbers["MINOR"], numbers["PATCH"]
    except KeyError as missing:
        raise ValueError(f"{path} does not say megatron-core's {missing}; {_USE}") from None


def release_problem(release: Release) -> str | None:
    """Returns why a release of megatron-core is refused, in one line; None where it is not."""
    name = f"megatron-core {'.'.join(map(str, release))}"
    if release < OLDEST:
        return f"{name} is older than this project knows; {_USE}"
    if reason := _REFUSED.get(release[:2]):
        return f"{name} is refused: {reason}; {_USE}"
    return None


def check_megatron_release() -> str | None:
    """Refuses an installed megatron-core that cannot train right.

    Returns:
        One line about a release that is newer than any that was tried; None for a known one.

    Raises:
        ValueError: see :func:`release_problem` and :func:`megatron_release`.
    """
    release = megatron_release()
    if problem := release_problem(release):
        raise ValueError(problem)
    if release[:2] > NEWEST:
        return (
            f"megatron-core {'.'.join(map(str, release))} is newer than any that was tried "
            f"({'.'.join(map(str, NEWEST))}); compare its first losses with a run on a known one"
        )
    return None
