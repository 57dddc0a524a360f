"""Gives every group of the configuration bounds on its fields, and rules of its own."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields
from functools import cache
from typing import Annotated, get_args, get_origin, get_type_hints

from mone_megatron.config.marks import Bound


class Group:
    """Is a dataclass of configuration fields that says by itself what is wrong with it.

    Bounds stand in the annotations of the fields (:mod:`mone_megatron.config.marks`). Each message
    is one line, ``key: what is wrong; fix``.
    """

    def unread(self) -> Mapping[str, str]:
        """Returns the fields that have no effect beside the others, each with the reason.

        The reason is the setting that makes it so, such as ``data.source=indexed``. What of them is
        set is told before a run (:mod:`mone_megatron.config.without_effect`).
        """
        return {}

    def boundless(self) -> Collection[str]:
        """Returns the fields whose bounds do not count beside the others."""
        return ()

    def rules(self) -> Iterator[str]:
        """Yields what is wrong between the fields of this group alone."""
        return iter(())


def problems(group: Group, written: Mapping[str, str], prefix: str = "") -> Iterator[str]:
    """Yields what is wrong with a group and the groups in it, without a look at other groups.

    Args:
        group: a group, or the whole configuration.
        written: dotted key -> the value as the user wrote it (``-1e-3``, which is read as -0.001),
            where that is known.
        prefix: what stands before the names of the fields, as in ``model.``.
    """
    found: list[str] = []
    boundless = group.boundless()
    # Any class can be hashed, which mypy doubts of classes whose objects cannot.
    cls: type = type(group)
    for name, bounds in _bounds(cls).items():
        if name in boundless:
            continue
        key = f"{prefix}{name}"
        value = getattr(group, name)
        if isinstance(value, Group):
            found += problems(value, written, f"{key}.")
            continue
        for bound in bounds:
            if problem := bound.problem(value):
                found.append(f"{key}: {_shown(value, written.get(key, ''))}{problem}")
    yield from found
    # What is wrong by itself is not told again for what it is beside the others.
    wrong = {line.split(":")[0] for line in found}
    yield from (line for line in group.rules() if line.split(":")[0] not in wrong)


def given(group: Group, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yields the dotted key and the value of each field that is not at its default.

    Args:
        group: a group, or a section of one.
        prefix: what stands before the names of the fields, as in ``model.``.
    """
    usual = type(group)()
    for name in names(group):
        value = getattr(group, name)
        if isinstance(value, Group):
            yield from given(value, f"{prefix}{name}.")
        elif value != getattr(usual, name):
            yield f"{prefix}{name}", value


def all_but(group: Group, kept: Collection[str], why: str) -> dict[str, str]:
    """Returns all fields of a group but those that have an effect, each with the same reason."""
    return {name: why for name in names(group) if name not in kept}


def names(group: Group) -> Iterator[str]:
    """Yields the names of a group's fields, in their order."""
    # A group is a dataclass, which its class does not say to mypy.
    for field in fields(group):  # type: ignore[arg-type]
        yield field.name


@cache
def _bounds(cls: type) -> dict[str, tuple[Bound, ...]]:
    """Returns the bounds of each field, by its name."""
    return {
        name: tuple(mark for mark in get_args(kind)[1:] if isinstance(mark, Bound))
        if get_origin(kind) is Annotated
        else ()
        for name, kind in get_type_hints(cls, include_extras=True).items()
    }


def _shown(value: object, written: str) -> str:
    """Returns the wrong number, to stand before what is wrong with it; "" for a blank text."""
    if isinstance(value, str):
        return ""
    # An interpolation says nothing about the number.
    if written and "${" not in written:
        return f"{written} "
    return f"{value:g} " if isinstance(value, float) else f"{value} "
