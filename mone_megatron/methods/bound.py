"""Defines bounds: which values of a configuration's field, or of a method's option, are right.

A bound stands in the annotation of a field, beside its type and default::

    p: Annotated[float, Within("(0, 1]", example=0.4)] = 0.4

This file is copied into exported models.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal


class Bound(ABC):
    """Says which values of a field are right, whatever the other fields are."""

    @property
    @abstractmethod
    def words(self) -> str:
        """Returns the right values in words, such as "1 or more"; "" if the type says enough."""

    @property
    @abstractmethod
    def json_schema(self) -> dict[str, Any]:
        """Returns the right values as keywords of JSON Schema."""

    @abstractmethod
    def problem(self, value: Any) -> str | None:
        """Returns what is wrong with ``value`` and the fix, without the key and the value."""


@dataclass(frozen=True)
class AtLeast(Bound):
    """Allows a number from ``least`` on.

    Attributes:
        least: the smallest right value.
        reason: what is wrong with a smaller one; None for the usual words.
    """

    least: int
    reason: str | None = None

    @property
    def words(self) -> str:
        """Returns such as "1 or more"."""
        return f"{self.least} or more"

    @property
    def json_schema(self) -> dict[str, Any]:
        """Returns the smallest value."""
        return {"minimum": self.least}

    def problem(self, value: float) -> str | None:
        """Returns the fix for a smaller number."""
        reason = self.reason or ("is too small" if self.least else "is negative")
        return None if value >= self.least else f"{reason}; use {self.words}"


@dataclass(frozen=True)
class AtMost(Bound):
    """Allows a number up to ``most``."""

    most: int

    @property
    def words(self) -> str:
        """Returns such as "9 or less"."""
        return f"{self.most} or less"

    @property
    def json_schema(self) -> dict[str, Any]:
        """Returns the largest value."""
        return {"maximum": self.most}

    def problem(self, value: float) -> str | None:
        """Returns the fix for a larger number."""
        return None if value <= self.most else f"is too large; use {self.words}"


@dataclass(frozen=True)
class Above(Bound):
    """Allows a number greater than ``limit``.

    Attributes:
        limit: the largest wrong value.
    """

    limit: int

    @property
    def words(self) -> str:
        """Returns such as "above 0"."""
        return f"above {self.limit}"

    @property
    def json_schema(self) -> dict[str, Any]:
        """Returns the limit, which is not included."""
        return {"exclusiveMinimum": self.limit}

    def problem(self, value: float) -> str | None:
        """Returns the fix for a number that is not above the limit."""
        reason = "is too small" if self.limit else "is not positive"
        return None if value > self.limit else f"{reason}; use a number {self.words}"


@dataclass(frozen=True)
class Within(Bound):
    """Allows a number between 0 and 1.

    Attributes:
        interval: which of the two ends belong to it: a square bracket includes the end.
        example: a usual share, to be offered; None to say the interval in words.
    """

    interval: Literal["[0, 1]", "[0, 1)", "(0, 1]"]
    example: float | None = None

    @property
    def words(self) -> str:
        """Returns the interval in words."""
        return {
            "[0, 1]": "from 0 to 1",
            "[0, 1)": "from 0 up to, not including, 1",
            "(0, 1]": "above 0, up to 1",
        }[self.interval]

    @property
    def json_schema(self) -> dict[str, Any]:
        """Returns both ends, each included or not."""
        low = "minimum" if self.interval[0] == "[" else "exclusiveMinimum"
        high = "maximum" if self.interval[-1] == "]" else "exclusiveMaximum"
        return {low: 0, high: 1}

    def problem(self, value: float) -> str | None:
        """Returns the fix for a number outside the interval."""
        ends = {"[": value == 0, "]": value == 1}
        if 0 < value < 1 or ends.get(self.interval[0]) or ends.get(self.interval[-1]):
            return None
        if self.example is not None:
            return f"is outside {self.interval}; use a share such as {self.example:g}"
        return f"is outside {self.interval}; use a number {self.words}"


@dataclass(frozen=True)
class NotEmpty(Bound):
    """Allows a text with a letter, a digit or a sign in it."""

    @property
    def words(self) -> str:
        """Returns "not empty"."""
        return "not empty"

    @property
    def json_schema(self) -> dict[str, Any]:
        """Returns a pattern that a blank text does not match."""
        return {"pattern": r"\S"}

    def problem(self, value: str) -> str | None:
        """Returns the fix for a blank text."""
        return None if value.strip() else "empty; give it a value"
