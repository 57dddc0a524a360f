"""Turns plain dictionaries into frozen dataclasses and back, strictly.

Nothing is coerced except an integer where a float is wanted and an integral float such as ``1e9``
where an integer is wanted. Problems are collected, not raised one by one.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from mone_megatron.config.errors import ConfigError
from mone_megatron.config.marks import Bound, NameIn, OptionsOf, Reserved

T = TypeVar("T")
Scalar = str | int | float | bool

_SECRET = re.compile(r"(^|_)(api_?key|token|password|passwd|secret|credentials?)s?($|_)", re.I)


def keys(cls: type, prefix: str = "") -> Iterator[str]:
    """Yields every dotted leaf key of the dataclass ``cls``, in order of declaration.

    The keys within an open section (:func:`open_sections`) are not the schema's, and left out.
    """
    for name, kind in _types(cls).items():
        if _is_section(kind):
            yield from keys(kind, f"{prefix}{name}.")
        elif not _is_open(kind):
            yield f"{prefix}{name}"


def sections(cls: type, prefix: str = "") -> Iterator[str]:
    """Yields every dotted key of ``cls`` that holds other keys, such as ``model.router``."""
    for name, kind in _types(cls).items():
        if _is_section(kind):
            yield f"{prefix}{name}"
            yield from sections(kind, f"{prefix}{name}.")
        elif _is_open(kind):
            yield f"{prefix}{name}"


def from_dict(
    cls: type[T],
    data: Mapping[str, Any],
    hints: Sequence[str] = (),
    typed: Mapping[str, str] | None = None,
) -> T:
    """Builds ``cls`` from nested dictionaries; absent keys take the dataclass's defaults.

    Args:
        cls: the dataclass to build.
        data: the keys and values of its fields.
        hints: further names to offer when a key is unknown (group options, say).
        typed: dotted key -> the value as the user wrote it (``1e-3``, which is read as 0.001),
            where that is known. What is wrong is told in these words.

    Raises:
        ConfigError: unknown keys, values of another type, ``_target_`` or secrets; all at once.
    """
    problems: list[str] = []
    known = [*keys(cls), *sections(cls), *hints]
    result = _build(cls, data, "", problems, known, typed or {})
    if problems:
        raise ConfigError(problems)
    return result


def flatten(config: Any, prefix: str = "") -> dict[str, Scalar]:
    """Returns dotted key -> scalar, for loggers; tuples become comma-separated text."""
    flat: dict[str, Scalar] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat.update(flatten(value, f"{prefix}{field.name}."))
        elif isinstance(value, tuple):
            flat[prefix + field.name] = ",".join(str(item) for item in value)
        elif isinstance(value, Mapping):
            flat |= {f"{prefix}{field.name}.{name}": held for name, held in value.items()}
        else:
            flat[prefix + field.name] = value
    return flat


def forbidden_key(key: str) -> str | None:
    """Returns why the dotted ``key`` may never be in a config, or None; it shows no value."""
    parts = key.split(".")
    if "_target_" in parts:
        return f"{key}: a config is data and nothing is instantiated from it; remove the `_target_`"
    # Fields of megatron-core are known by name (calculate_per_token_loss), and none is a secret.
    if parts[0] != "megatron" and any(_SECRET.search(part) for part in parts):
        return (
            f"{key}: secrets do not belong in a config, which is saved with the run; "
            "use `wandb login` or the environment variable of the service"
        )
    return None


def unknown_key(key: str, known: Sequence[str]) -> str:
    """Returns a line about ``key``, which is not among ``known``, with the nearest names."""
    return forbidden_key(key) or f"{key}: unknown key; {suggest(key, known)}"


def suggest(name: str, known: Sequence[str]) -> str:
    """Returns ``did you mean ...?`` with the dotted ``known`` names that are like ``name``."""
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.75)
    if not near:
        # The right leaf in the wrong section, or without one: `steps`, `optim.seq_length`.
        leaf = name.rsplit(".", 1)[-1]
        leaves = {candidate.rsplit(".", 1)[-1] for candidate in known}
        best = difflib.get_close_matches(leaf, sorted(leaves), n=1, cutoff=0.75)
        near = [key for key in known if best and key.rsplit(".", 1)[-1] == best[0]][:3]
    if not near:
        section = name.split(".", 1)[0]
        inside = [key for key in known if key.startswith(f"{section}.")]
        inside = [key for key in inside if not any(k.startswith(f"{key}.") for k in inside)]
        if inside:
            return f"keys of {section}: " + ", ".join(key.split(".", 1)[1] for key in inside)
        return "see docs/configuration.md for the keys"
    return "did you mean " + " or ".join(near) + "?"


def open_sections(cls: type, prefix: str = "") -> Iterator[str]:
    """Yields every dotted key of ``cls`` whose own keys are not fixed: ``mone.rule_options``."""
    for name, kind in _types(cls).items():
        if _is_section(kind):
            yield from open_sections(kind, f"{prefix}{name}.")
        elif _is_open(kind):
            yield f"{prefix}{name}"


def is_known(key: str, known: Sequence[str], cls: type) -> bool:
    """Returns whether ``key`` is among ``known``, or within an open section of ``cls``."""
    section, _, name = key.rpartition(".")
    return key in known or (bool(name) and section in open_sections(cls))


# Evaluating annotations takes longer than all else that is done with them, for every override.
@functools.cache
def _types(cls: type) -> Mapping[str, Any]:
    return get_type_hints(cls)


@functools.cache
def _annotated_types(cls: type) -> Mapping[str, Any]:
    return get_type_hints(cls, include_extras=True)


def _is_section(kind: type) -> bool:
    return dataclasses.is_dataclass(kind)


def _is_open(kind: type) -> bool:
    return get_origin(kind) is collections.abc.Mapping


@dataclasses.dataclass(frozen=True)
class _Given:
    """Holds a value, and the text that the user wrote for it, or None where that is not known."""

    value: Any
    text: str | None = None

    @property
    def shown(self) -> str:
        """Returns the value as messages show it: a text in quotes, others as they were written."""
        if isinstance(self.value, str):
            return f"the text {self.value!r}"
        if self.text is not None:
            return self.text
        if isinstance(self.value, Mapping):
            return "a section"
        return self.written

    @property
    def written(self) -> str:
        """Returns the value as it was written, or as one would write it."""
        if self.text is not None:
            return self.text
        if self.value is None or isinstance(self.value, bool):
            return {None: "null", True: "true", False: "false"}[self.value]
        return str(self.value)

    def items(self) -> list[_Given]:
        """Returns the items of a list, each with its own text where that can be told."""
        texts: list[str | None] = [None] * len(self.value)
        if self.text is not None and not set(self.text) & set("\"'{}()\\#\n"):
            # No comma is within an item.
            found = [item.strip() for item in self.text.strip().strip("[]").split(",")]
            if len(found) == len(texts):
                texts = [*found]
        return [_Given(item, text) for item, text in zip(self.value, texts, strict=True)]


def _build(
    cls: type[T],
    data: Any,
    prefix: str,
    problems: list[str],
    known: Sequence[str],
    typed: Mapping[str, str],
) -> T:
    if not isinstance(data, Mapping):
        where = prefix.rstrip(".") or "config"
        given = _Given(data, typed.get(where))
        problems.append(
            f"{where}: expected a section with keys, got {given.shown}; write {where}.KEY"
        )
        return cls()
    # Any class can be hashed, which mypy doubts of classes whose objects cannot.
    plain: type = cls
    types = _annotated_types(plain)
    values: dict[str, Any] = {}
    for name, value in data.items():
        key = f"{prefix}{name}"
        if name not in types:
            problems.append(unknown_key(key, known))
        elif _is_section(types[name]):
            values[name] = _build(types[name], value, f"{key}.", problems, known, typed)
        else:
            try:
                values[name] = _convert(_Given(value, typed.get(key)), types[name])
            except _HeldError as error:
                problems.append(f"{key}.{error}")
            except ValueError as error:
                problems.append(f"{key}: {error}")
    return cls(**values)


class _HeldError(ValueError):
    """Says what is wrong with one of the names that an open field holds: ``NAME: what; fix``."""


def _convert(given: _Given, kind: Any) -> Any:
    """Returns the value as ``kind``; a ValueError says what is wrong and the fix, not the key."""
    value = given.value
    if get_origin(kind) is Literal:
        return _convert_literal(given, get_args(kind))
    if get_origin(kind) is Annotated:
        plain, *marks = get_args(kind)
        for mark in marks:
            # Bounds and options are checked with the whole configuration (config/group.py).
            if not isinstance(mark, (Bound, OptionsOf, Reserved)):
                assert isinstance(mark, NameIn), f"the schema has an unknown mark: {mark}"
                _convert_literal(given, tuple(mark.registry.names))
        if _is_open(plain):
            return _convert_mapping(given, [mark for mark in marks if isinstance(mark, Reserved)])
        return _convert(given, plain)
    if _is_open(kind):
        return _convert_mapping(given, ())
    if get_origin(kind) is tuple:
        return _convert_tuple(given, get_args(kind))
    if kind is bool:
        if not isinstance(value, bool):
            raise ValueError(f"expected true or false, got {given.shown}; write true or false")
        return value
    if kind is str:
        if not isinstance(value, str):
            raise ValueError(
                f"expected text, got {given.shown}; put it in quotes: '\"{given.written}\"'"
            )
        return value
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        if not number or not math.isfinite(value) or value != int(value):
            raise ValueError(f"expected an integer, got {given.shown}; write one such as 4")
        return int(value)
    assert kind is float, f"the schema uses a type that cannot be read: {kind}"
    if not number or not math.isfinite(value):
        raise ValueError(f"expected a number, got {given.shown}; write one such as 0.1")
    return float(value)


def _convert_literal(given: _Given, options: tuple[str, ...]) -> str:
    value = given.value
    # `True == 1`, so the type is compared as well.
    for option in options:
        if value == option and type(value) is type(option):
            return option
    near = difflib.get_close_matches(given.written, options, n=1)
    hint = f"did you mean {near[0]}?" if near else "choose one of them"
    raise ValueError(f"{given.shown} is not one of {', '.join(options)}; {hint}")


def _convert_mapping(given: _Given, reserved: Sequence[Reserved]) -> dict[str, Scalar]:
    value = given.value
    if not isinstance(value, Mapping):
        raise ValueError(f"expected names with values, got {given.shown}; write {{name: value}}")
    for name, held in value.items():
        if not isinstance(held, Scalar):
            # That it may not be there at all comes before what it may be.
            refusals = filter(None, (mark.refusal(str(name)) for mark in reserved))
            wrong = f"{_Given(held).shown} is no single value; give a text, a number, true or false"
            raise _HeldError(f"{name}: {next(refusals, wrong)}")
    return {str(name): held for name, held in value.items()}


def _convert_tuple(given: _Given, kinds: tuple[Any, ...]) -> tuple[Any, ...]:
    value = given.value
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"expected a list, got {given.shown}; write [{given.written}]")
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        return tuple(_convert(item, kinds[0]) for item in given.items())
    if len(value) != len(kinds):
        raise ValueError(f"expected {len(kinds)} values, got {len(value)}; write all of them")
    return tuple(_convert(item, kind) for item, kind in zip(given.items(), kinds, strict=True))
