"""Says under which key or in which column the text of each input is: ``KEY``, ``PATTERN=KEY``."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

DEFAULT_KEY = "text"


@dataclass(frozen=True)
class TextKeys:
    """Holds the key, or column, of the text of every input.

    Attributes:
        default: of an input that no pattern matches.
        by_pattern: pairs of a pattern and a key; the last pattern that matches an input counts.
    """

    default: str = DEFAULT_KEY
    by_pattern: tuple[tuple[str, str], ...] = ()

    def of(self, path: Path) -> str:
        """Returns the key of the text in a file."""
        for pattern, key in reversed(self.by_pattern):
            if _matches(pattern, path):
                return key
        return self.default

    def check(self, option: str, paths: Iterable[Path], *, what: str) -> None:
        """Checks that each pattern is about an input.

        Args:
            option: that gives the keys, for the message.
            paths: the inputs that have keys.
            what: these inputs are, for the message.

        Raises:
            ValueError: one matches none.
        """
        files = list(paths)
        for pattern, key in self.by_pattern:
            if not any(_matches(pattern, path) for path in files):
                raise ValueError(
                    f"{option} {pattern}={key}: {pattern} matches no input of {what}; write it as "
                    "the inputs are written, or leave it out"
                )


def parse_keys(option: str, given: Sequence[str]) -> TextKeys:
    """Returns the keys that an option gives, which may be given several times.

    Args:
        option: its name, for messages.
        given: each ``KEY``, for all inputs, or ``PATTERN=KEY``; a pattern may hold "=", a key not.

    Raises:
        ValueError: there are two keys for all inputs, or one is empty.
    """
    default: str | None = None
    by_pattern = []
    for text in given:
        pattern, equals, key = text.rpartition("=")
        if not key or (equals and not pattern):
            raise ValueError(f"{option}: {text!r} is neither KEY nor PATTERN=KEY")
        if equals:
            by_pattern.append((pattern, key))
        elif default is not None:
            raise ValueError(
                f"{option}: {default} and {key} are both for all inputs; write PATTERN=KEY for one"
            )
        else:
            default = key
    return TextKeys(DEFAULT_KEY if default is None else default, tuple(by_pattern))


def _matches(pattern: str, path: Path) -> bool:
    """Returns whether a pattern is that of a file or of a folder that it is in.

    A pattern without a leading slash may begin at any folder of the path.
    """
    if any(place.match(pattern) for place in (path, *path.parents)):
        return True
    # What "**" means to the inputs, too.
    return "**" in pattern and str(path) in glob.glob(pattern, recursive=True)
