"""Marks configuration fields: which numbers, texts and names a field may have.

A mark stands in a field's annotation, beside its type and default::

    num_layers: Annotated[int, AtLeast(1)] = 4
    score: Annotated[str, NameIn(SCORES)] = "abs_activation"

Names are looked up when a value is read (:mod:`mone_megatron.config.convert`). Bounds are those of
methods' options, too (:mod:`mone_megatron.methods.bound`); they are checked with the whole
configuration (:mod:`mone_megatron.config.group`). All are shown in ``docs/configuration.md``
(:mod:`mone_megatron.config.reference`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from mone_megatron.methods.bound import Above, AtLeast, AtMost, Bound, NotEmpty, Within

__all__ = [
    "Above",
    "AtLeast",
    "AtMost",
    "Bound",
    "HasNames",
    "NameIn",
    "NotEmpty",
    "OptionsOf",
    "Reserved",
    "Within",
]


class HasNames(Protocol):
    """Is a registry, as far as a configuration reads it."""

    @property
    def names(self) -> Iterable[str]:
        """Returns every name that it holds."""

    @property
    def package(self) -> str:
        """Returns the folder of its files, as Python imports it."""


@dataclass(frozen=True)
class NameIn:
    """Requires the value to be a name in a registry of methods."""

    registry: HasNames


class HasOptions(Protocol):
    """Is a method, as far as a configuration reads its options."""

    @property
    def name(self) -> str:
        """Returns its name."""

    @property
    def options(self) -> type:
        """Returns the dataclass of its options."""


@dataclass(frozen=True)
class Reserved:
    """Says which names an open field may not hold, whatever their values are.

    Attributes:
        refusal: returns what is wrong with a name and the fix; None for one that it may hold.
    """

    refusal: Callable[[str], str | None]


@dataclass(frozen=True)
class OptionsOf:
    """Says that a field holds options by name, those of the chosen method of a registry.

    Attributes:
        methods: the registry.
    """

    methods: Iterable[HasOptions]
