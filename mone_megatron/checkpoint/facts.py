"""Checks what a run writes about itself into a manifest: plain values, and no secret."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

# The fact that tells which model of others a run's weights began as. It goes from the checkpoint
# that a run begins with into each of its own.
ORIGIN = "origin"
_SECRET_WORDS = frozenset({"KEY", "APIKEY", "TOKEN", "SECRET", "PASSWORD", "PASSWD", "PASSPHRASE"})
# Shorter values ("1", "true") are no secrets and would be found in anything.
_SHORTEST_SECRET = 8


def check_facts(facts: Mapping[str, Any], *, environment: Mapping[str, str]) -> dict[str, Any]:
    """Returns ``facts`` as JSON will give them back, after checking them.

    Args:
        facts: strings, numbers, booleans, None, and lists and string-keyed dicts of them.
        environment: the process's environment variables; the value of one that is named like a
            secret (``..._KEY``, ``..._TOKEN``, ``..._PASSWORD``) must not be in any string.

    Raises:
        ValueError: naming the fact, and the variable but not its value.
    """
    plain = _plain(facts, "facts")
    secrets = {
        name: value
        for name, value in environment.items()
        if len(value) >= _SHORTEST_SECRET and _SECRET_WORDS.intersection(name.upper().split("_"))
    }
    for where, text in _strings(plain, "facts"):
        for name, value in secrets.items():
            if value in text:
                raise ValueError(
                    f"{where} holds the value of the environment variable {name}, which must not "
                    "get into a checkpoint; remove it from the configuration"
                )
    assert isinstance(plain, dict)
    return plain


def _plain(value: Any, where: str) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where} is {value}, which JSON cannot hold")
        return float(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"{where} has the key {key!r}; keys must be strings")
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    raise ValueError(f"{where} is of type {type(value).__name__}, which JSON cannot hold")


def _strings(value: Any, where: str) -> Iterator[tuple[str, str]]:
    """Yields where each string in plain facts is, keys too, and the string."""
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _strings(item, f"{where}[{index}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield "a key of " + where, key
            yield from _strings(item, f"{where}.{key}")
