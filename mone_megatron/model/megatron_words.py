"""Translates megatron-core's refusals into the words of our configuration.

:mod:`mone_megatron.config.validate` refuses what megatron-core would, with our keys and before
anything starts. What it does not know of (a rule of another release) is translated here, so that no
user is told to set an option of another program.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from mone_megatron.config.errors import ConfigError
from mone_megatron.config.megatron import SET_HERE

# Their field (an option of their command line is the same with dashes) -> our key.
_KEYS: dict[str, str] = {
    **{field: key for field, key in SET_HERE["transformer"].items() if " " not in key},
    # Options of their command line that are no fields.
    "num_experts": "model.num_experts",
    "norm_epsilon": "model.norm_eps",
}
# A field or an option: words joined by underscores or dashes, with or without leading dashes.
_NAME = re.compile(r"(?<![\w.-])(--)?([a-z][a-z0-9]*(?:[-_][a-z0-9]+)+)\b")


def in_our_words(text: str) -> str:
    """Returns megatron-core's message in one line, with our keys for its fields and options."""

    def translate(match: re.Match[str]) -> str:
        key = _KEYS.get(match[2].replace("-", "_"))
        if key is not None:
            return key
        return f"megatron-core's {match[2].replace('-', ' ')}" if match[1] else match[0]

    return _NAME.sub(translate, " ".join(text.split()))


@contextmanager
def megatron_refusals() -> Iterator[None]:
    """Turns what megatron-core refuses in the block into an error of our configuration.

    Raises:
        ConfigError: it begins with the first of our keys in the message ("model" if none is).
    """
    try:
        yield
    except ConfigError:
        raise
    # ImportError: a setting that wants a package (Transformer Engine, mostly).
    except (AssertionError, ValueError, ImportError) as error:
        text = in_our_words(str(error))
        found = re.search(r"\b(?:model|parallel|train|device)\.[a-z_.]*[a-z]", text)
        raise ConfigError(
            f"{found[0] if found else 'model'}: megatron-core refuses the configuration ({text}); "
            "change the keys that are named"
        ) from error
