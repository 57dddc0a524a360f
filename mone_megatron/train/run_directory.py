"""What a run writes under ``run.dir``: config.yaml, run.json, metrics.jsonl and the report."""

from __future__ import annotations

import errno
import json
import os
import tempfile
import uuid
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mone_megatron.os_errors import naming, unusable
from mone_megatron.ownership import OWNER_FILE, live_owner
from mone_megatron.whole_files import json_text

_FOLDERS = ("checkpoints", "hangs", "tensorboard")
_RUN_FILES = (
    "config.yaml",
    "run.json",
    "metrics.jsonl",
    "panel.jsonl",
    "alerts.jsonl",
    "report.html",
    "loss.png",
    *_FOLDERS,
)


def check_can_be_made(folder: Path) -> None:
    """Checks that a folder is there or could be made.

    An empty folder is made where it would be, and taken away again: what a system says of rights
    does not tell where nothing can be made, such as /proc, to one who may write everywhere.

    Raises:
        ValueError: nothing can be written there. One line.
    """
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    wrong: OSError | None = None
    if not place.is_dir():
        wrong = NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(place))
    else:
        try:
            Path(tempfile.mkdtemp(prefix=".dry-run-", dir=place)).rmdir()
        except OSError as error:
            wrong = error
            wrong.filename = str(place)
    if wrong is not None:
        raise unusable("run.dir", folder, wrong)


def check_run_directory(folder: Path) -> None:
    """Checks that what a run would write into ``folder`` can be written. Changes nothing.

    Args:
        folder: one that this process owns.

    Raises:
        ValueError: a folder lies where a file belongs, or the other way round; one of them cannot
            be written; or a live run is inside what a new run would move away. One line.
    """
    try:
        for name in _RUN_FILES:
            path = folder / name
            if not path.exists():
                continue
            wanted = "folder" if name in _FOLDERS else "file"
            if path.is_dir() != (name in _FOLDERS):
                raise ValueError(f"run.dir: {path} is no {wanted}; move it, or name another folder")
            if not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            if path.is_dir():
                _check_nobody_inside(path)
    except OSError as error:
        raise unusable("run.dir", folder, error) from None


def _check_nobody_inside(folder: Path) -> None:
    for file in folder.rglob(OWNER_FILE):
        if owner := live_owner(file.parent):
            raise ValueError(
                f"run.dir: {file.parent} is in use by {owner}; give that run a folder of its own, "
                "or wait until it has ended"
            )


def open_run_directory(folder: Path) -> str | None:
    """Makes ``folder``, moving the files of an earlier run in it aside.

    Returns:
        A sentence about what was moved, or None.

    Raises:
        ValueError: when the folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        old = [folder / name for name in _RUN_FILES if (folder / name).exists()]
        if old:
            number = 1
            while (earlier := folder / "earlier" / str(number)).exists():
                number += 1
            earlier.mkdir(parents=True)
            for path in old:
                path.rename(earlier / path.name)
            return f"{folder} held an earlier run: moved to {earlier}"
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    except OSError as error:
        raise unusable("run.dir", folder, error) from None
    return None


def run_id(folder: Path) -> str:
    """Returns the id of the run in ``folder``, kept when it is resumed; a new one for a new run."""
    try:
        known = json.loads((folder / "run.json").read_text(encoding="utf-8"))["id"]
    except (OSError, ValueError, KeyError, TypeError):
        return uuid.uuid4().hex[:12]
    return str(known)


def keep_metrics_up_to(path: Path, step: int) -> float:
    """Drops the records after ``step`` of metrics.jsonl, and returns the kept steps' seconds."""
    seconds: list[float] = []
    keep_records_up_to(path, step, lambda record: seconds.append(record.get("step_seconds", 0.0)))
    return sum(seconds)


def keep_records_up_to(path: Path, step: int, see: Callable[[dict[str, Any]], None]) -> None:
    """Drops the records after ``step``, which a resumed run makes again; whole or not at all.

    Args:
        path: a file of one JSON object a line, each with its ``step``; it need not exist.
        step: the last that is kept.
        see: is given each record that is kept, in their order.
    """
    if not path.exists():
        return
    draft = path.with_name(path.name + ".tmp")
    with (
        naming(draft),
        path.open(encoding="utf-8") as lines,
        draft.open("w", encoding="utf-8") as kept,
    ):
        for line in lines:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # the line that a killed run was writing
                continue
            if record["step"] <= step:
                see(record)
                kept.write(line.rstrip("\n") + "\n")
    os.replace(draft, path)


def to_json_line(record: dict[str, float]) -> str:
    """Returns one record as strict JSON: null for what is not finite, integers for counts."""
    counts = {key: int(record[key]) for key in ("step", "tokens") if key in record}
    return json_text(record | counts, indent=None)


def now() -> str:
    """Returns UTC time, ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
