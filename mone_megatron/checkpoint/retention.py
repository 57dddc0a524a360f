"""Decides which checkpoints to keep, by a pure function."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Saved:
    """Describes a checkpoint as retention sees it."""

    step: int
    # Position in the order of saving; larger is newer.
    serial: int


def steps_to_delete(
    saved: Iterable[Saved], *, last: int, every: int, keep: Iterable[int] = ()
) -> list[int]:
    """Returns the steps whose checkpoints may go, the oldest save first.

    Args:
        saved: the checkpoints there are, one a step.
        last: the newest so many saves stay; at least 1.
        every: checkpoints whose step is a multiple of this stay for good; 0 for none.
        keep: further steps that stay.

    Raises:
        ValueError: ``last`` is below 1 or ``every`` below 0.
    """
    if last < 1:
        raise ValueError(f"the number of checkpoints to keep is {last}; it must be 1 or more")
    if every < 0:
        raise ValueError(f"checkpoints to keep for good: every {every} steps; use 0 for none")
    kept = set(keep)
    # By time of saving, not by step: after going back, older steps are the newer saves.
    by_age = sorted(saved, key=lambda one: (one.serial, one.step))
    return [
        one.step
        for one in by_age[:-last]
        if one.step not in kept and not (every and one.step % every == 0)
    ]
