"""Defines the group ``checkpoint``: saving and resuming."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated

from mone_megatron.config.group import Group
from mone_megatron.config.marks import AtLeast, NotEmpty


@dataclass(frozen=True)
class CheckpointConfig(Group):
    """Says when a run is saved, what is kept, and what it resumes from."""

    interval: Annotated[int, AtLeast(0)] = 0
    """Save every so many steps; 0 for never."""
    async_save: bool = False
    """Write beside training: a save stops training only until its state is handed over."""
    resume: Annotated[str, NotEmpty()] = "never"
    """`never` starts afresh, `auto` takes the newest checkpoint of this run, a path takes that
    one."""
    initialize: str = ""
    """A checkpoint whose weights a new run begins with, fresh in all else
    (docs/checkpoints.md#beginning-with-the-weights-of-a-checkpoint); "" for none. With
    `resume=auto`, checkpoints of the run itself come first."""
    keep_last: Annotated[int, AtLeast(1)] = 2
    """How many of the newest checkpoints are kept."""
    keep_every: Annotated[int, AtLeast(0)] = 0
    """Checkpoints whose step is a multiple of this are kept as well; 0 for none of those."""

    def unread(self) -> Mapping[str, str]:
        """Returns how checkpoints are written and kept, where none is."""
        if self.interval > 0:
            return {}
        return dict.fromkeys(("async_save", "keep_last", "keep_every"), "checkpoint.interval=0")

    def rules(self) -> Iterator[str]:
        """Yields what is wrong between the fields of this group alone."""
        if self.initialize and self.resume not in ("never", "auto"):
            yield (
                "checkpoint.initialize: has no effect on a run that goes on from "
                f"checkpoint.resume={self.resume}; use one of them, or checkpoint.resume=auto"
            )
