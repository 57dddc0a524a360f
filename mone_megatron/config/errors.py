"""Defines the error of a configuration that cannot be run."""

from __future__ import annotations

from collections.abc import Sequence


class ConfigError(ValueError):
    """Says that a configuration cannot be run, and why.

    Attributes:
        problems: one line each, ``key: what is wrong; fix``. ``str(error)`` is these lines.
    """

    def __init__(self, problems: Sequence[str] | str) -> None:
        lines = [problems] if isinstance(problems, str) else list(problems)
        self.problems: tuple[str, ...] = tuple(" ".join(line.split()) for line in lines)
        super().__init__("\n".join(self.problems))
