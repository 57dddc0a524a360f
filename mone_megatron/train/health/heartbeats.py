"""What each rank tells the others while it runs, and which rank a hang is due to."""

from __future__ import annotations

import json
import linecache
import sysconfig
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import torch
from torch.distributed import distributed_c10d

_TORCH = str(Path(torch.__file__).parent)
_STDLIB = sysconfig.get_path("stdlib")
_SITE = sysconfig.get_path("purelib")
# Where torch's collectives are; its checkpoints are under torch/distributed, too.
_COLLECTIVES = tuple(
    f"{_TORCH}/distributed/{name}.py"
    for name in ("distributed_c10d", "c10d_logger", "_functional_collectives")
)
# Calls without a Python frame of their own that wait for other ranks.
_WAITS = (".wait(", "synchronize(")
# gloo counts sends and receives, too, of which stages have different numbers.
_UNEQUAL = "PIPELINE_MODEL_PARALLEL_GROUP"


@dataclass(frozen=True)
class Place:
    """Says where a thread is: the line that tells most, and the collective that it waits in."""

    line: str
    call: str | None = None

    def __str__(self) -> str:
        return f"in {self.call} at {self.line}" if self.call else f"at {self.line}"


def place_of(frame: FrameType | None, lineno: int | None = None) -> Place:
    """Returns the place of a stack's innermost frame.

    Args:
        frame: innermost.
        lineno: its line, when it is not at it any more (of a traceback).
    """
    call: str | None = None
    if frame is not None and not _is_stdlib(frame.f_code.co_filename):
        text = linecache.getline(frame.f_code.co_filename, lineno or _line_of(frame))
        if any(wait in text for wait in _WAITS):
            call = "wait"
    while frame is not None:
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        if path in _COLLECTIVES:
            # The outermost wins: what was called, and not what that calls.
            call = call if name == "wrapper" else name
        elif not path.startswith((_TORCH, "<")) and not _is_stdlib(path):
            short = "/".join(Path(path).parts[-3:])
            return Place(f"{short}:{lineno or _line_of(frame)} in {name}", call)
        frame, lineno = frame.f_back, None
    return Place("an unknown line", call)


def _line_of(frame: FrameType) -> int:
    """Returns the line that a frame is at; 0 between two lines, where Python gives it none.

    Another thread's frame is looked at while it runs, so this does happen.
    """
    line: int | None = frame.f_lineno
    return line or 0


def program_place(frame: FrameType | None) -> list[tuple[str, int]]:
    """Returns the stack of our own and Megatron's functions, outermost first."""
    stack = []
    while frame is not None:
        path = frame.f_code.co_filename
        if not path.startswith((_TORCH, "<")) and not _is_stdlib(path):
            stack.append((f"{Path(path).name} {frame.f_code.co_name}", _line_of(frame)))
        frame = frame.f_back
    return stack[::-1]


def _is_ahead(one: Heartbeat, other: Heartbeat) -> bool:
    """Returns whether a rank is further on in the program: in the same function at a later line."""
    for (function, line), (other_function, other_line) in zip(one.stack, other.stack, strict=False):
        if function != other_function:
            return False
        if line != other_line:
            return line > other_line
    return False


def _is_stdlib(path: str) -> bool:
    return path.startswith(_STDLIB) and not path.startswith(_SITE)


def joined_collectives() -> dict[str, int]:
    """Returns how many collectives this rank has started in each group of two or more."""
    groups = list(distributed_c10d._world.pg_names.items())
    return {
        f"{name} ({group.group_desc})": group._get_sequence_number_for_group()  # type: ignore[attr-defined]
        for group, name in groups
        if group.size() > 1
    }


@dataclass(frozen=True)
class Heartbeat:
    """Tells of one rank, about once a second."""

    rank: int
    host: str
    pid: int
    # Moves as long as the process runs.
    alive: int
    # What it has done of the run, for people, and as a number that grows.
    phase: str
    beats: int
    # Where its main thread is: see Place.
    line: str
    call: str | None
    # See program_place.
    stack: list[tuple[str, int]]
    joined: dict[str, int]
    # Why it left the run; None while it is in it.
    ended: str | None = None
    # Whether it left because a collective failed, the fault being elsewhere.
    bereft: bool = False

    def to_json(self) -> str:
        """Returns it as the store holds it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Heartbeat:
        """Returns what the store holds as a heartbeat."""
        return cls(**json.loads(text))

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid})"

    @property
    def doing(self) -> str:
        """Returns phase and place in words."""
        return f"{self.phase}, {Place(self.line, self.call)}"


@dataclass(frozen=True)
class Culprit:
    """Names a rank that others wait for, with a sentence about it."""

    rank: int
    why: str


def find_culprits(
    before: Mapping[int, Heartbeat],
    after: Mapping[int, Heartbeat],
    *,
    size: int,
    asking: int,
    seconds: float,
) -> list[Culprit]:
    """Returns the ranks that the others wait for, from two looks at all heartbeats.

    In this order: ranks that do not run or have left the run; ranks that have joined fewer
    collectives of some group than another rank and wait for no one in this sense; where all wait
    for each other, those that most wait for, of these the ones furthest on in the program; ranks
    in no collective.

    Args:
        before: by rank; those that were there.
        after: the same some time later.
        size: number of ranks.
        asking: this rank, which does run.
        seconds: time between the two looks.
    """
    gone = [
        culprit
        for rank in range(size)
        if rank != asking
        and (culprit := _gone(rank, before.get(rank), after.get(rank), seconds)) is not None
    ]
    if gone:
        return gone
    present = {rank: beat for rank, beat in after.items() if beat.ended is None}
    behind = {
        rank: reason
        for rank, beat in present.items()
        if (reason := _behind(beat, present)) is not None
    }
    waiting = {rank for _, ranks in behind.values() for rank in ranks}
    free = [rank for rank in behind if rank not in waiting]
    if not free and behind:
        # A rank that left a collective out is ahead of the others in the run.
        weight = {rank: (len(ranks), present[rank].beats) for rank, (_, ranks) in behind.items()}
        most = [rank for rank in behind if weight[rank] == max(weight.values())]
        free = [
            rank
            for rank in most
            if not any(_is_ahead(present[other], present[rank]) for other in most)
        ]
    if free:
        return [
            Culprit(rank, f"{present[rank]} {behind[rank][0]}; it is {present[rank].doing}")
            for rank in sorted(free)
        ]
    return [
        Culprit(rank, f"{beat} is in no collective; it is {beat.doing}")
        for rank, beat in sorted(present.items())
        if beat.call is None
    ]


def _gone(
    rank: int, before: Heartbeat | None, after: Heartbeat | None, seconds: float
) -> Culprit | None:
    if after is None:
        return Culprit(rank, f"rank {rank} has never been heard of")
    if after.ended is not None:
        return None if after.bereft else Culprit(rank, f"{after} has left: {after.ended}")
    if before is not None and before.alive == after.alive:
        return Culprit(
            rank,
            f"{after} has not run for {seconds:.0f} s or more: dead, stopped or cut off; it was "
            f"{after.doing}",
        )
    return None


def _behind(beat: Heartbeat, all_beats: Mapping[int, Heartbeat]) -> tuple[str, set[int]] | None:
    """Returns the group in which most ranks are ahead of one, and all ranks ahead in any."""
    ahead: dict[str, set[int]] = {
        group: {rank for rank, other in all_beats.items() if other.joined.get(group, 0) > count}
        for group, count in beat.joined.items()
        if _UNEQUAL not in group
    }
    counts = Counter({group: len(ranks) for group, ranks in ahead.items() if ranks})
    if not counts:
        return None
    group = counts.most_common(1)[0][0]
    number = max(all_beats[rank].joined[group] for rank in ahead[group])
    return (
        f"has joined {beat.joined[group]} of {number} collectives of group {group}",
        set().union(*ahead.values()),
    )
