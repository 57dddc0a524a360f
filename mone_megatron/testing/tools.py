"""Loads the command lines under ``tools/``, to be called in this process."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

from mone_megatron.testing.launch import REPOSITORY

Main = Callable[[Sequence[str]], int]


def load_tool(name: str) -> Main:
    """Returns ``main`` of ``tools/NAME.py``: it takes the arguments and gives the exit status."""
    path = REPOSITORY / "tools" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{name}_tool", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    main: Main = module.main
    return main
