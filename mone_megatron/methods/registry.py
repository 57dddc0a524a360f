"""Finds every method of one kind by name, in one folder and in installed packages."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import re
from collections.abc import Iterator
from functools import cache, cached_property
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Generic, Protocol, TypeVar

# Installed packages name their methods under this group of entry points.
ENTRY_POINTS = "mone_megatron.methods"


class Method(Protocol):
    """Has what every method has, of whatever kind."""

    @property
    def name(self) -> str:
        """Returns the name that a configuration uses."""


M = TypeVar("M", bound=Method)


class Registry(Generic[M]):
    """Holds the methods of one kind; looking up a name that it lacks raises a ``ValueError``."""

    def __init__(self, kind: type[M], *, key: str, package: str) -> None:
        """Describes a registry; its files are imported when it is first read.

        Args:
            kind: the class whose instances are its methods.
            key: the configuration key that names one of them, for messages.
            package: the folder of its files, as Python imports it. Every module in it defines
                ``METHOD``.
        """
        self.kind = kind
        self.key = key
        self.package = package

    @cached_property
    def _found(self) -> dict[str, tuple[M, str]]:
        """Returns each method, and the module that defines it or the entry point that names it."""
        found: dict[str, tuple[M, str]] = {}
        for origin, method in (*self._own(), *self._installed()):
            if method.name in found:
                raise ValueError(
                    f"{self.key}: {method.name!r} is defined twice, by {found[method.name][1]} and "
                    f"by {origin}; rename one of them"
                )
            found[method.name] = method, origin
        return dict(sorted(found.items()))

    @cached_property
    def _methods(self) -> dict[str, M]:
        return {name: method for name, (method, _) in self._found.items()}

    def file_of(self, name: str) -> Path:
        """Returns the file of a method.

        Raises:
            ValueError: no method has the name.
        """
        assert self[name] is not None
        # "package.module", or "package.module:METHOD of a distribution".
        module = re.split("[: ]", self._found[name][1])[0]
        file = importlib.import_module(module).__file__
        assert file is not None, f"{module} has no file"
        return Path(file)

    def _own(self) -> Iterator[tuple[str, M]]:
        """Yields the methods of the folder, each with the module that defines it."""
        folder = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(folder.__path__, f"{self.package}."):
            method = getattr(importlib.import_module(module.name), "METHOD", None)
            # A file that was forgotten halfway is found by whoever wrote it, at once.
            assert isinstance(method, self.kind), f"{module.name}.METHOD is no {self.kind.__name__}"
            yield module.name, method

    def _installed(self) -> Iterator[tuple[str, M]]:
        """Yields the methods of this kind that installed packages define."""
        for origin, method in _installed_methods():
            if isinstance(method, self.kind):
                yield origin, method

    @property
    def names(self) -> tuple[str, ...]:
        """Returns every name, sorted."""
        return tuple(self._methods)

    def __contains__(self, name: object) -> bool:
        return name in self._methods

    def __iter__(self) -> Iterator[M]:
        return iter(self._methods.values())

    def __len__(self) -> int:
        return len(self._methods)

    def __getitem__(self, name: str) -> M:
        """Returns the method of a name.

        Raises:
            ValueError: no method has it. The message names the key and the nearest names.
        """
        try:
            return self._methods[name]
        except KeyError:
            near = difflib.get_close_matches(str(name), self.names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(self.names)}"
            raise ValueError(f"{self.key}: {name!r} is unknown; {hint}") from None


@cache
def _installed_methods() -> tuple[tuple[str, object], ...]:
    """Loads what installed packages name under the entry points, each with where it comes from."""
    return tuple(
        (_origin(entry), _load(entry))
        for entry in sorted(entry_points(group=ENTRY_POINTS), key=_origin)
    )


def _origin(entry: EntryPoint) -> str:
    package = entry.dist.name if entry.dist is not None else "an installed package"
    return f"{entry.value} of {package}"


def _load(entry: EntryPoint) -> object:
    try:
        return entry.load()
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"the entry point {entry.name!r} of {ENTRY_POINTS}, {_origin(entry)}, cannot be "
            f"loaded ({error}); mend or uninstall that package"
        ) from error


def imported(reference: str) -> object:
    """Returns what ``module:attribute`` names, importing the module.

    Methods name torch functions and kernels so, in order to need neither before they are used.
    """
    module, _, attribute = reference.partition(":")
    return getattr(importlib.import_module(module), attribute)
