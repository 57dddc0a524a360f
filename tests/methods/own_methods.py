"""Tells the methods of this package from those that an installed package adds.

Of each method here a test has a reference of its own; that of another is its author's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mone_megatron
from mone_megatron.methods.registry import Registry

_PACKAGE = Path(mone_megatron.__file__).parent


def own_names(registry: Registry[Any]) -> list[str]:
    """Returns the names of the methods that this package defines."""
    return [name for name in registry.names if _PACKAGE in registry.file_of(name).parents]
