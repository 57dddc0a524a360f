"""Keeps what was measured in a file: one JSON object a line, the settings first.

A line is written at once and synced, so a process that is killed loses what it was measuring and
nothing else; a line that it did not finish is dropped when the file is opened again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mone_megatron.evaluation.estimates import Estimate
from mone_megatron.evaluation.harness import Score
from mone_megatron.report.files import check_output

FILE = "results.jsonl"
_FORMAT = 1

Json = dict[str, Any]
_Parsed = TypeVar("_Parsed")


class Results:
    """Keeps what was measured under some settings; :func:`open_results` makes it."""

    def __init__(self, path: Path, records: list[Json]) -> None:
        self._path = path
        self._by_key = {_key(record["key"]): record for record in records}

    def __len__(self) -> int:
        return len(self._by_key)

    def get(self, key: Mapping[str, Any]) -> Json | None:
        """Returns what was kept under a key; None if nothing was."""
        record = self._by_key.get(_key(key))
        return None if record is None else record["value"]

    def read(self, key: Mapping[str, Any], parse: Callable[[Json], _Parsed]) -> _Parsed:
        """Returns what was kept under a key, which must be there, as ``parse`` understands it.

        Raises:
            ValueError: it does not.
        """
        kept = self.get(key)
        assert kept is not None
        try:
            return parse(kept)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{self._path}: the result of {json.dumps(dict(key))} is damaged ({error!r}); "
                "give another --output"
            ) from None

    def add(self, key: Mapping[str, Any], value: Json) -> None:
        """Keeps ``value`` for good."""
        record = {"key": dict(key), "value": value}
        _append(self._path, record)
        self._by_key[_key(key)] = record

    def same_or_add(self, key: Mapping[str, Any], value: Json, what: str) -> None:
        """Keeps ``value``, or checks that it is what was kept before.

        Raises:
            ValueError: it is not, naming the first difference.
        """
        before = self.get(key)
        if before is None:
            self.add(key, value)
        else:
            _check_same(self._path, before, value, what)


def open_results(folder: Path, settings: Json) -> Results:
    """Begins a results file in an empty folder, or goes on with the one that is there.

    Args:
        folder: need not be there.
        settings: everything that a measured number depends on, but for its key.

    Raises:
        ValueError: the folder holds other files, or results of other settings; one line that names
            the first difference.
    """
    path = folder / FILE
    settings = json.loads(json.dumps({"format": _FORMAT, **settings}))
    if not path.exists():
        check_output(folder, FILE)
        folder.mkdir(parents=True, exist_ok=True)
        _append(path, {"settings": settings})
        return Results(path, [])
    lines = _whole_lines(path)
    if not lines:
        _append(path, {"settings": settings})
        return Results(path, [])
    before, *records = [_record(path, number, line) for number, line in enumerate(lines, start=1)]
    _check_same(path, before["settings"], settings, "settings")
    return Results(path, records)


def _record(path: Path, number: int, line: bytes) -> Json:
    """Returns one line: the settings in the first, a key with its value in all others."""
    names = ("settings",) if number == 1 else ("key", "value")
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict) or not all(isinstance(record.get(n), dict) for n in names):
        raise ValueError(
            f"{path}: line {number} is damaged: it is no object with {' and '.join(names)}; "
            "give another --output"
        )
    return record


def score_to_json(score: Score) -> Json:
    """Returns a score with what its differences to others need, as for JSON."""
    estimate = score.estimate
    fields = {name: value for name, value in vars(score).items() if name != "estimate"}
    return fields | {
        "value": estimate.value,
        "count": estimate.count,
        "influence": estimate.influence.tolist(),
        "replicates": estimate.replicates.tolist(),
    }


def score_from_json(content: Mapping[str, Any]) -> Score:
    """Returns the score that :func:`score_to_json` gave ``content`` for."""
    fields = dict(content)
    estimate = Estimate(
        fields.pop("value"),
        fields.pop("count"),
        np.asarray(fields.pop("influence"), dtype=np.float64),
        np.asarray(fields.pop("replicates"), dtype=np.float64),
    )
    return Score(estimate=estimate, **fields)


def _key(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


def _append(path: Path, record: Json) -> None:
    line = (json.dumps(record) + "\n").encode("utf-8")
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        written = os.write(handle, line)
        if written != len(line):
            raise OSError(f"{path}: only {written} of {len(line)} bytes were written; disk full?")
        os.fsync(handle)
    finally:
        os.close(handle)


def _whole_lines(path: Path) -> list[bytes]:
    """Returns the lines of the file, which is cut after the last that was finished."""
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end != len(content):
        os.truncate(path, end)
    return content[:end].splitlines()


def _check_same(path: Path, before: Mapping[str, Any], now: Mapping[str, Any], what: str) -> None:
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise ValueError(
                f"--output: {path} holds results of other {what}: {name} was {before.get(name)!r} "
                f"and is {now.get(name)!r}; give the same or another folder"
            )
