"""Collects what a run on the fake device found, by its phase, with the lines that did it."""

from __future__ import annotations

import sys
import traceback
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from typing import Any

# Only frames of these are places; the longest stack that is looked at.
_PLACES = ("mone_megatron/", "megatron/core/", "torch/optim/")
_DEPTH = 8
WAIT = "wait"


@dataclass(frozen=True)
class Finding:
    """Describes one thing that one line did.

    Attributes:
        kind: ``wait`` (the host waits for the device), ``copy`` (a copy between host and device
            that the host does not wait for), or ``fault`` (a GPU would refuse it).
        what: in words.
        place: the innermost line of ours or of megatron-core.
        ours: the innermost line of ours.
    """

    kind: str
    what: str
    place: str
    ours: str

    @property
    def by_us(self) -> bool:
        """Returns whether our code did it itself, rather than a library that it called."""
        return self.place.startswith("mone_megatron/")

    @property
    def in_layer(self) -> bool:
        """Returns whether it is done in each layer, forward or backward."""
        ours = ("mone", "kernels", "model", "methods")
        folders = [f"mone_megatron/{folder}/" for folder in ours]
        return self.place.startswith((*folders, "megatron/core/transformer/"))


@dataclass
class Findings:
    """Collects all that a run did, by phase; ``phase`` is set by whoever runs the steps."""

    phase: str = "building"
    found: defaultdict[str, Counter[Finding]] = field(default_factory=lambda: defaultdict(Counter))
    collectives: defaultdict[str, Counter[str]] = field(
        default_factory=lambda: defaultdict(Counter)
    )
    launches: Counter[str] = field(default_factory=Counter)
    # Process groups that this rank made, with those that it is not in.
    groups: int = 0

    def note(self, kind: str, what: str) -> None:
        """Counts what the line that is being executed did."""
        place, ours = _where()
        self.found[self.phase][Finding(kind, what, place, ours)] += 1

    def collective(self, name: str) -> None:
        """Counts a collective."""
        self.collectives[self.phase][f"{name}  {_where()[0]}"] += 1

    def as_json(self) -> dict[str, Any]:
        """Returns everything as lists and numbers."""
        return {
            "found": {
                phase: [asdict(finding) | {"count": count} for finding, count in some.most_common()]
                for phase, some in self.found.items()
            },
            "collectives": {phase: dict(some) for phase, some in self.collectives.items()},
            "launches": dict(self.launches),
            "groups": self.groups,
        }


def _where() -> tuple[str, str]:
    """Returns the innermost frame of the project or megatron-core, and that of the project."""
    places: list[str] = []
    for frame, line in traceback.walk_stack(sys._getframe(2)):
        name = frame.f_code.co_filename
        if "/testing/fake_cuda/" in name:
            continue
        for part in _PLACES:
            if part in name:
                places.append(f"{name[name.rindex(part) :]}:{line} {frame.f_code.co_name}")
                break
        if len(places) == _DEPTH:
            break
    ours = next((place for place in places if place.startswith("mone_megatron/")), "?")
    return (places or ["?"])[0], ours
