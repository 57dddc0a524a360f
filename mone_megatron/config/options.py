"""Checks options that a method declares, in the words of configuration keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mone_megatron.config.convert import Scalar, from_dict, keys
from mone_megatron.config.errors import ConfigError
from mone_megatron.methods.options import options_of


def problems(options: type, given: Mapping[str, Scalar], *, key: str, owner: str) -> Iterator[str]:
    """Yields what is wrong with the options of a method.

    Args:
        options: the dataclass that the method declares.
        given: values by name.
        key: the key that holds them: ``mone.rule_options``.
        owner: the key and the name of the method, for messages: ``mone.rule=topk``.
    """
    names = ", ".join(keys(options)) or "none"
    try:
        from_dict(options, given)
    except ConfigError as error:
        for problem in error.problems:
            yield f"{key}.{problem} (options of {owner}: {names})"
        return
    known = options_of(options)
    for name, value in given.items():
        if wrong := known[name].problem(value):
            yield f"{key}.{name}: {wrong}"
