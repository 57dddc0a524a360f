"""Trains with a certain Adam of those that megatron-core takes, whatever is installed.

``python -m mone_megatron.lab.gpu_check.with_adam {torch,transformer_engine} key=value ...`` takes
what ``python -m mone_megatron.pretrain`` takes, and fails when another Adam was used.
"""

from __future__ import annotations

import runpy
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Literal, get_args

Adam = Literal["torch", "transformer_engine"]
# megatron-core takes the first that it can import.
_OTHERS = ("transformer_engine.pytorch.optimizers", "apex.optimizers")


def leave_torchs_alone() -> None:
    """Has megatron-core find no Adam but torch's; it must not have been imported yet."""
    assert "megatron.core.optimizer" not in sys.modules
    if find_spec("transformer_engine") is not None:
        # It imports its optimizers itself.
        import_module("transformer_engine.pytorch")
    for module in _OTHERS:
        sys.modules[module] = None  # type: ignore[assignment]


def main() -> int:
    """Trains, and returns the exit status of training, or 1 when another Adam was used."""
    adam, arguments = sys.argv[1], sys.argv[2:]
    if adam not in get_args(Adam):
        print(f"error: {adam}: no such Adam; use torch or transformer_engine", file=sys.stderr)
        return 2
    if adam == "torch":
        leave_torchs_alone()
    sys.argv = ["pretrain", *arguments]
    try:
        runpy.run_module("mone_megatron.pretrain", run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise
    module: str = sys.modules["megatron.core.optimizer"].Adam.__module__
    if not module.startswith(f"{adam}."):
        print(f"error: Adam is of {module}, not of {adam}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
