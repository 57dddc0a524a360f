"""Reads the options that a method declares: a frozen dataclass whose fields have defaults.

A field may have a bound beside its type (:mod:`mone_megatron.methods.bound`), and has a sentence in
quotes below it, for tables and editors: ``routers/top_p.py`` has one such option.

This file is copied into exported models. It imports no torch, so that options can be checked
without.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from mone_megatron.methods.bound import Bound


@dataclass(frozen=True)
class NoOptions:
    """Holds the options of a method that has none."""


@dataclass(frozen=True)
class Option:
    """Describes one option: its default, and the bounds on it."""

    default: Any
    bounds: tuple[Bound, ...] = ()

    def problem(self, value: object) -> str | None:
        """Returns what is wrong with a value and the fix, without its name; None for nothing."""
        if not _fits(value, type(self.default)):
            return f"{value!r} is no {type(self.default).__name__}; give one such as {self.default}"
        found = (bound.problem(value) for bound in self.bounds)
        return next((f"{value} {problem}" for problem in found if problem), None)


def options_of(cls: type) -> Mapping[str, Option]:
    """Returns the options that a dataclass declares, by their names."""
    hints = get_type_hints(cls, include_extras=True)
    found = {}
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        marks = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
        bounds = tuple(mark for mark in marks if isinstance(mark, Bound))
        found[field.name] = Option(field.default, bounds)
    return found


def read_options(
    cls: type, known: Mapping[str, Option], given: Mapping[str, Any], *, key: str, owner: str
) -> Any:
    """Returns an instance of a method's options.

    Args:
        cls: the dataclass of the options.
        known: what :func:`options_of` says of it. It is found out once: torch.compile, which may
            come by where a model reads its settings, does not follow how fields are read.
        given: values by name; those left out take their defaults.
        key: the configuration key that holds them.
        owner: the key and the name of the method, for messages.

    Raises:
        ValueError: a name is unknown, or a value is of another type or out of bounds, one line for
            each.
    """
    problems = []
    for name, value in given.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            has = ", ".join(known) or "none"
            hint = f"did you mean {near[0]}?" if near else f"it has {has}"
            problems.append(f"{key}.{name}: {owner} has no such option; {hint}")
        elif problem := known[name].problem(value):
            problems.append(f"{key}.{name}: {problem}")
    if problems:
        raise ValueError("\n".join(problems))
    return cls(**given)


def _fits(value: object, kind: type) -> bool:
    """Returns whether a value is of a type; integers are numbers, true and false are neither."""
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, (int, float) if kind is float else kind)
