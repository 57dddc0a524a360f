"""Defines what a benchmark of the command line is, and what it gives."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Outcome(NamedTuple):
    """Holds what a benchmark gives: lines for people, results and a picture for files."""

    hardware: str
    lines: list[str]
    result: Any
    draw: Callable[[], Figure] | None = None


@dataclass(frozen=True)
class Benchmark:
    """Describes one benchmark of ``bench``.

    Args:
        name: the word that chooses it.
        help: what it times, in a few words, for the list of commands.
        description: the same in a line.
        examples: command lines, from its name on.
        add_options: adds its options to a parser.
        measure: runs it with these options.
    """

    name: str
    help: str
    description: str
    examples: tuple[str, ...]
    add_options: Callable[[argparse.ArgumentParser], None]
    measure: Callable[[argparse.Namespace], Outcome]
