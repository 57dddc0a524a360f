"""Reads and writes ``latest.json``, which names the checkpoint that a run continues from."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from mone_megatron.checkpoint import durable
from mone_megatron.checkpoint.names import step_of

TRACKER_NAME = "latest.json"
_MAX_BYTES = 1 << 16


@dataclass(frozen=True)
class Tracker:
    """Holds the content of ``latest.json``."""

    step: int
    # Name of the checkpoint beside the tracker.
    folder: str
    # SHA-256 of that checkpoint's manifest.json, as hex.
    manifest_sha256: str


def write_tracker(store: Path, tracker: Tracker) -> None:
    """Replaces a store's tracker atomically.

    Raises:
        CheckpointWriteError: naming the path; the tracker is then the old one or the new one.
    """
    durable.replace_file(store / TRACKER_NAME, _spell(tracker))


def read_tracker(store: Path) -> Tracker | None:
    """Reads a store's tracker; returns None when there is none.

    Raises:
        ValueError: it is no tracker; the message names the file and says what is wrong.
    """
    path = store / TRACKER_NAME
    try:
        with path.open("rb") as stream:
            text = stream.read(_MAX_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from error
    if not text.strip():
        raise ValueError(f"{path} is empty")
    try:
        tracker = Tracker(**json.loads(text))
        spelled = _spell(tracker)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged") from error
    # The name is joined to the store's; only a checkpoint's own name may be.
    if (
        spelled != text
        or not isinstance(tracker.folder, str)
        or not isinstance(tracker.manifest_sha256, str)
        or type(tracker.step) is not int
        or step_of(tracker.folder) != tracker.step
    ):
        raise ValueError(f"{path} is damaged")
    return tracker


def _spell(tracker: Tracker) -> bytes:
    return (json.dumps(asdict(tracker)) + "\n").encode("ascii")
