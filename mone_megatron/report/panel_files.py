"""Reads ``alerts.jsonl`` and ``panel.jsonl`` of a run (docs/metrics.md)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mone_megatron.report.runs import LayerGrid

ALERTS_FILE = "alerts.jsonl"
PANEL_FILE = "panel.jsonl"


@dataclass(frozen=True)
class AlertSpan:
    """Describes one alert from its beginning to its end.

    Attributes:
        kind: dead_expert, dead_neurons, load_collapse or shrinking_weights.
        part: router, routed, shared or dense: of the layer.
        layer: from 1.
        expert: from 0, or None.
        begin: the step that began it.
        end: the step that ended it; None when none did.
        value: measured when it began.
        threshold: of the configuration.
        message: what a run said when it began.
    """

    kind: str
    part: str
    layer: int
    expert: int | None
    begin: int
    end: int | None
    value: float
    threshold: float
    message: str


@dataclass(frozen=True)
class LastPanel:
    """Holds the statistics of every routed expert at the last step that looked at them.

    Attributes:
        step: that step.
        grids: statistic -> layers by experts (``steps`` holds the experts' numbers).
    """

    step: int
    grids: Mapping[str, LayerGrid]


def read_alerts(directory: Path) -> list[AlertSpan] | None:
    """Returns the alerts of a run in the order in which they began; None where none were looked
    for.

    Raises:
        ValueError: a line is no alert; one line naming the file and the line.
    """
    path = directory / ALERTS_FILE
    if not path.is_file():
        return None
    spans: dict[tuple[Any, ...], dict[str, Any]] = {}
    done: list[dict[str, Any]] = []
    for number, record in _records(path):
        try:
            place = tuple(record[key] for key in ("kind", "part", "layer", "expert"))
            if record["event"] == "begin":
                spans[place] = {
                    **dict(zip(("kind", "part", "layer", "expert"), place, strict=True)),
                    "begin": record["step"],
                    "end": None,
                    **{key: record[key] for key in ("value", "threshold", "message")},
                }
                done.append(spans[place])
            else:
                spans[place]["end"] = record["step"]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{path} line {number} is not an alert ({error!r}): remove that line"
            ) from None
    return [AlertSpan(**span) for span in done]


def read_last_panel(directory: Path) -> LastPanel | None:
    """Returns the routed experts at the last step that looked at them; None when none did.

    Raises:
        ValueError: the last line is no panel; one line naming the file and the line.
    """
    path = directory / PANEL_FILE
    if not path.is_file():
        return None
    last = None
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.endswith(b"\n"):  # else a killed process was writing it
                last = number, line
    if last is None:
        return None
    number, line = last
    try:
        record = json.loads(line)
        layers = [layer for layer in record["layers"] if layer["mlp"] == "routed"]
        step = int(record["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} line {number} is not a panel ({error!r}): remove that line"
        ) from None
    names = dict.fromkeys(
        name for layer in layers for name, row in layer.items() if isinstance(row, list)
    )
    grids = {}
    for name in names:
        having = [layer for layer in layers if name in layer]
        values = np.array([layer[name] for layer in having], dtype=np.float64)
        grids[name] = LayerGrid(
            tuple(layer["layer"] for layer in having), np.arange(values.shape[1]), values
        )
    return LastPanel(step, grids)


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields parsed lines with their numbers; a last one that a kill cut off is passed over."""
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            yield number, json.loads(line)
        except ValueError:  # of JSON or of UTF-8
            if number < len(lines):
                raise ValueError(
                    f"{path} line {number} is not a JSON object: remove that line"
                ) from None
