"""Trains a run and writes which keys of its configuration nothing but its checks has read.

python record_reads.py FILE OVERRIDE ...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from mone_megatron.config.group import Group, names
from mone_megatron.config.load import compose
from mone_megatron.pretrain import pretrain

# What looks at every field, whatever it is.
_CHECKS = ("/mone_megatron/config/", "/train/resume/identity.py")
_OF_CHECKS = {"validate", "without_effect", "to_yaml", "flatten"}


def prefixes(group: Group, prefix: str = "") -> dict[int, tuple[Group, str]]:
    """Returns the groups by their identity, with what stands before the names of their fields."""
    found = {id(group): (group, prefix)}
    for name in names(group):
        value = getattr(group, name)
        if isinstance(value, Group):
            found |= prefixes(value, f"{prefix}{name}.")
    return found


def is_check(frame: FrameType | None) -> bool:
    """Returns whether a field is read for the checks alone, or for others by a group's property."""
    while frame is not None and any(part in frame.f_code.co_filename for part in _CHECKS):
        if frame.f_code.co_name in _OF_CHECKS:
            return True
        frame = frame.f_back
    return frame is None or "dataclasses.py" in frame.f_code.co_filename


def main() -> int:
    """Trains, and returns the exit code."""
    file, *overrides = sys.argv[1:]
    config = compose(overrides)
    groups = prefixes(config)
    leaves = {
        f"{prefix}{name}"
        for group, prefix in groups.values()
        for name in names(group)
        if not isinstance(getattr(group, name), Group)
    }
    read: set[str] = set()
    for cls in {type(group) for group, _ in groups.values()}:
        usual = cls.__getattribute__

        def watched(self: Group, name: str, usual: Any = usual) -> Any:
            if id(self) in groups and not name.startswith("_") and not is_check(sys._getframe(1)):
                read.add(f"{groups[id(self)][1]}{name}")
            return usual(self, name)

        cls.__getattribute__ = watched  # type: ignore[method-assign]
    code = pretrain(config)
    Path(file).write_text(json.dumps(sorted(leaves - read)), encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
