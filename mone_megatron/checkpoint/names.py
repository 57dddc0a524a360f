"""Makes and reads the names of folders in a store.

``step_00000120`` is a checkpoint. ``.step_00000120.KIND-HOST-PID-RANDOM`` never is one; ``KIND``:

- ``partial``: a save that has not ended;
- ``replaced``: the checkpoint a save of the same step takes the place of, for the moment between
  two renames;
- ``deleted``: on its way out.
"""

from __future__ import annotations

import os
import re
import socket
import uuid
from dataclasses import dataclass
from typing import Literal

Kind = Literal["partial", "replaced", "deleted"]

_CHECKPOINT = re.compile(r"step_(\d{8,18})", re.ASCII)
_HIDDEN = re.compile(
    r"\.step_(\d{8,18})\.(partial|replaced|deleted)-([A-Za-z0-9_.-]+)-(\d{1,18})-([0-9a-f]{8})",
    re.ASCII,
)


@dataclass(frozen=True)
class HiddenName:
    """Holds what the name of a hidden folder says."""

    step: int
    kind: Kind
    # The process that gave the name.
    host: str
    pid: int


def checkpoint_name(step: int) -> str:
    """Returns the folder name of a checkpoint: ``step_00000120``."""
    return f"step_{step:08d}"


def step_of(name: str) -> int | None:
    """Returns the step that a checkpoint's folder name says; None for other names."""
    match = _CHECKPOINT.fullmatch(name)
    # One spelling for each step: no more zeros than eight digits need.
    if match is None or checkpoint_name(int(match[1])) != name:
        return None
    return int(match[1])


def hidden_name(step: int, kind: Kind) -> str:
    """Returns a new name, unlike any other, that tells this process as its owner."""
    return f".{checkpoint_name(step)}.{kind}-{host_name()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def parse_hidden(name: str) -> HiddenName | None:
    """Returns what a name from :func:`hidden_name` says; None for other names."""
    match = _HIDDEN.fullmatch(name)
    if match is None:
        return None
    kinds: dict[str, Kind] = {"partial": "partial", "replaced": "replaced", "deleted": "deleted"}
    return HiddenName(step=int(match[1]), kind=kinds[match[2]], host=match[3], pid=int(match[4]))


def host_name() -> str:
    """Returns this machine's name in characters that a file name can hold."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", socket.gethostname())[:64] or "unknown"
