"""The mark of a configuration field whose value is a name in a registry of methods."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


class HasNames(Protocol):
    """A registry, as far as a configuration reads it."""

    @property
    def names(self) -> Iterable[str]:
        """Every name that it holds."""


@dataclass(frozen=True)
class NameIn:
    """Stands in a field's annotation: ``score: Annotated[str, NameIn(SCORES)]``."""

    registry: HasNames
