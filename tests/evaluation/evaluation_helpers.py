"""What the tests of evaluation share beside fixtures."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

from mone_megatron.config.load import CONF_DIR

Main = Callable[[Sequence[str]], int]
# A text that is on every machine.
TEXT = Path(argparse.__file__).read_text(encoding="utf-8")
# Tokens that the models are made for.
MAX_LENGTH = 96


def load_tool(name: str) -> Main:
    """``main`` of a tool."""
    path = CONF_DIR.parent / "tools" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{name}_tool", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function: Main = module.main
    return function
