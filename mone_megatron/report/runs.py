"""Reads a run directory: ``config.yaml``, ``metrics.jsonl`` and ``run.json``.

``docs/metrics.md`` says what each key means. Reading is tolerant of what a killed or resumed run
leaves behind and of nothing else.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from mone_megatron.report.stats import FloatArray, default_span, exponential_moving_average

IntArray = npt.NDArray[np.int64]

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "run.json"

# Share of the steps, at the end, over which the final train loss is averaged.
FINAL_SHARE = 0.05

_LAYER_KEY = re.compile(r"(?P<metric>.+)/layer_(?P<layer>\d+)")
_NON_FINITE = {
    "nan": math.nan,
    "inf": math.inf,
    "infinity": math.inf,
    "+inf": math.inf,
    "-inf": -math.inf,
    "-infinity": -math.inf,
}


@dataclass(frozen=True)
class Series:
    """Holds one metric over the steps that recorded it.

    Attributes:
        steps: ``[n]`` int64, strictly ascending.
        values: ``[n]`` float64; NaN or inf where the run wrote a non-finite number.
    """

    steps: IntArray
    values: FloatArray

    def __len__(self) -> int:
        return len(self.steps)

    def smoothed(self, span: float | None = None) -> Series:
        """Returns the bias-corrected moving average; `span` None suits the curve's length."""
        chosen = default_span(len(self)) if span is None else span
        return Series(self.steps, exponential_moving_average(self.values, chosen))

    def on(self, steps: IntArray) -> Series:
        """Returns the part of the series whose step is in `steps`."""
        kept = np.isin(self.steps, steps)
        return Series(self.steps[kept], self.values[kept])

    def tail_mean(self, share: float = FINAL_SHARE) -> float:
        """Returns the mean over the last `share` of the points, rounded up, so at least one.

        Non-finite values are not left out: a loss that ended as NaN has a NaN mean.
        """
        return float(self.values[-math.ceil(share * len(self)) :].mean())


@dataclass(frozen=True)
class LayerGrid:
    """Holds one metric of every layer that has it, over the steps that recorded any of them.

    Attributes:
        layers: layer numbers from 1, ascending; dense layers without experts are absent.
        steps: ``[n]`` int64.
        values: ``[len(layers), n]`` float64; NaN where a layer has no finite value.
    """

    layers: tuple[int, ...]
    steps: IntArray
    values: FloatArray


@dataclass(frozen=True)
class RunSummary:
    """Holds ``run.json``. A field the file does not have is None (or an empty mapping)."""

    name: str
    status: str
    world_size: int | None
    device: str | None
    hardware: str | None
    versions: Mapping[str, str]
    data_fingerprint: str | None
    vocab_size: int | None
    parameters: Mapping[str, int]
    flops_per_step: Mapping[str, float]
    # As above, of what tokens used where the method leaves it open; empty where it is set.
    measured_parameters: Mapping[str, int]
    measured_flops_per_step: Mapping[str, float]
    seed: int | None
    started: str | None
    seconds: float | None
    tokens: int | None


@dataclass(frozen=True)
class Run:
    """Holds one run as it was read.

    Attributes:
        path: the run directory.
        config: ``config.yaml`` as nested plain data.
        summary: ``run.json``.
        columns: every numeric key of ``metrics.jsonl``, each with the steps that recorded it.
        broken_lines: unreadable pieces of ``metrics.jsonl`` left by a killed process.
    """

    path: Path
    config: Mapping[str, Any]
    summary: RunSummary
    columns: Mapping[str, Series]
    broken_lines: int = 0

    @property
    def name(self) -> str:
        """Returns the run's own name."""
        return self.summary.name

    @property
    def last_step(self) -> int:
        """Returns the last step with a loss."""
        return int(self.columns["loss"].steps[-1])

    def series(self, key: str) -> Series:
        """Returns one metric over the steps that recorded it.

        Raises:
            ValueError: the run never recorded `key`.
        """
        if key not in self.columns:
            raise ValueError(f"{self.path / METRICS_FILE} has no {key!r}: see docs/metrics.md")
        return self.columns[key]

    def has(self, key: str) -> bool:
        """Returns whether any step recorded `key`."""
        return key in self.columns

    def setting(self, key: str) -> Any:
        """Returns the value of a dotted configuration key such as ``train.seq_length``; None if
        absent.
        """
        value: Any = self.config
        for part in key.split("."):
            if not isinstance(value, Mapping) or part not in value:
                return None
            value = value[part]
        return value

    def median(self, key: str) -> float | None:
        """Returns the median of the finite values of a metric; None when there are none.

        The median leaves out the slow first step and hiccups without a cut-off to choose.
        """
        if key not in self.columns:
            return None
        values = self.columns[key].values
        finite = values[np.isfinite(values)]
        return float(np.median(finite)) if len(finite) else None

    @property
    def final_train_loss(self) -> float:
        """Returns the mean train loss over the last 5% of the recorded steps (rounded up; NaN if
        any is).
        """
        return self.columns["loss"].tail_mean()

    @property
    def final_validation_loss(self) -> float | None:
        """Returns the last validation loss; None when the run never evaluated."""
        return float(self.columns["val_loss"].values[-1]) if self.has("val_loss") else None

    @property
    def tokens(self) -> int | None:
        """Returns the tokens trained on: the last record's count, else ``run.json``'s."""
        if self.has("tokens") and math.isfinite(self.columns["tokens"].values[-1]):
            return int(self.columns["tokens"].values[-1])
        return self.summary.tokens

    @property
    def parameters(self) -> Mapping[str, int]:
        """Returns ``run.json``'s counts of parameters, those activated as measured if they were."""
        return {**self.summary.parameters, **self.summary.measured_parameters}

    @property
    def flops_per_step(self) -> Mapping[str, float]:
        """Returns ``run.json``'s operations of a step, as measured if they were."""
        return {**self.summary.flops_per_step, **self.summary.measured_flops_per_step}

    @property
    def seed(self) -> int | None:
        """Returns ``run.json``'s seed, else ``train.seed``."""
        return self.summary.seed if self.summary.seed is not None else self.setting("train.seed")

    @cached_property
    def layer_metrics(self) -> Mapping[str, tuple[int, ...]]:
        """Returns the metrics that have per-layer keys, with their layer numbers in order."""
        found: dict[str, list[int]] = {}
        for key in self.columns:
            if match := _LAYER_KEY.fullmatch(key):
                found.setdefault(match["metric"], []).append(int(match["layer"]))
        return {metric: tuple(sorted(layers)) for metric, layers in sorted(found.items())}

    def layer_grid(self, metric: str) -> LayerGrid:
        """Returns a per-layer metric as a grid of layers by steps.

        Raises:
            ValueError: no layer recorded `metric`.
        """
        if metric not in self.layer_metrics:
            raise ValueError(
                f"{self.path / METRICS_FILE} has no {metric + '/layer_N'!r}: "
                "set logging.layer_interval to record it"
            )
        layers = self.layer_metrics[metric]
        columns = [self.columns[f"{metric}/layer_{layer}"] for layer in layers]
        steps = np.unique(np.concatenate([column.steps for column in columns]))
        values = np.full((len(layers), len(steps)), np.nan)
        for row, column in zip(values, columns, strict=True):
            finite = np.where(np.isfinite(column.values), column.values, np.nan)
            row[np.searchsorted(steps, column.steps)] = finite
        return LayerGrid(layers, steps, values)


def load_run(path: str | Path) -> Run:
    """Reads a run directory.

    Tolerated are flaws that killed and resumed runs leave: a half-written last line; a line that a
    resumed run appended to a half-written one; steps recorded again after a resume, where the last
    record wins and records of later steps from before the resume are dropped with it; non-finite
    numbers written as null, bare NaN or text. Text and nested values are not columns.

    Raises:
        ValueError: a file is missing, empty or not what its name says; one line naming it.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a folder: give the run.dir of a run")
    config = _read_config(directory / CONFIG_FILE)
    summary = _read_summary(directory / SUMMARY_FILE)
    records, broken = _read_records(directory / METRICS_FILE)
    columns = _columns(records)
    if records[-1]["step"] == 0:
        raise ValueError(_no_step(directory / METRICS_FILE))
    if "loss" not in columns:
        raise ValueError(
            f"{directory / METRICS_FILE} has no 'loss' in any record: "
            "give the run.dir of a training run"
        )
    return Run(directory, config, summary, columns, broken)


def _read_text(path: Path, remedy: str) -> str:
    if not path.is_file():
        raise ValueError(f"{path} does not exist: {remedy}")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as text ({error}): {remedy}") from error


def _read_config(path: Path) -> dict[str, Any]:
    text = _read_text(path, "give the run.dir of a run, which holds config.yaml")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = str(error).replace("\n", " ")
        raise ValueError(f"{path} is not YAML ({reason}): restore the run's own file") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no configuration: restore the run's own file")
    return config


def _read_summary(path: Path) -> RunSummary:
    text = _read_text(path, "give the run.dir of a run, which writes run.json when it starts")
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}): restore the run's own file") from error
    if not isinstance(data, dict) or not isinstance(data.get("status"), str):
        raise ValueError(f"{path} has no 'status': restore the run's own file")

    def number(value: Any) -> float | None:
        return _as_number(value) if value is not None else None

    def integer(key: str) -> int | None:
        value = number(data.get(key))
        return int(value) if value is not None and math.isfinite(value) else None

    def text_or_none(key: str) -> str | None:
        return str(data[key]) if data.get(key) is not None else None

    def mapping(key: str) -> dict[str, Any]:
        value = data.get(key)
        return value if isinstance(value, dict) else {}

    def numbers(value: Any) -> dict[str, float]:
        given = value if isinstance(value, dict) else {}
        parsed = {name: number(each) for name, each in given.items()}
        return {name: each for name, each in parsed.items() if each is not None}

    def counts(value: Any) -> dict[str, int]:
        return {name: int(each) for name, each in numbers(value).items() if math.isfinite(each)}

    measured = mapping("measured")

    return RunSummary(
        name=text_or_none("name") or path.parent.name,
        status=data["status"],
        world_size=integer("world_size"),
        device=text_or_none("device"),
        hardware=text_or_none("hardware"),
        versions={name: str(value) for name, value in mapping("versions").items()},
        data_fingerprint=text_or_none("data_fingerprint"),
        vocab_size=integer("vocab_size"),
        parameters=counts(data.get("parameters")),
        flops_per_step=numbers(data.get("flops_per_step")),
        measured_parameters=counts(measured.get("parameters")),
        measured_flops_per_step=numbers(measured.get("flops_per_step")),
        seed=integer("seed"),
        started=text_or_none("started"),
        seconds=number(data.get("seconds")),
        tokens=integer("tokens"),
    )


def _read_records(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Returns records in ascending order of step, and how many broken pieces were passed over."""
    text = _read_text(path, "the run ended before its first step, so there is nothing to show")
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1)]
    lines = [(number, line) for number, line in lines if line.strip("\0 \t\r")]
    records: list[dict[str, Any]] = []
    broken = 0
    for position, (number, line) in enumerate(lines):
        record, pieces = _parse_line(line)
        broken += pieces
        if record is None:
            if position == len(lines) - 1:
                break
            raise ValueError(f"{path} line {number} is not a JSON object: remove that line")
        step = record.get("step")
        if not isinstance(step, int) or isinstance(step, bool):
            raise ValueError(f"{path} line {number} has no whole number 'step': remove that line")
        # A resumed run takes over from here on.
        while records and records[-1]["step"] >= step:
            records.pop()
        records.append(record)
    if not records:
        raise ValueError(_no_step(path))
    return records, broken


def _no_step(path: Path) -> str:
    return f"{path} holds no step: the run ended before its first one, run it again"


def _parse_line(line: str) -> tuple[dict[str, Any] | None, int]:
    """Returns the record of a line, or None, and the number of broken pieces in it.

    A process killed while writing leaves half a line without its end, and a resumed one may append
    its first record right behind it.
    """
    start = 0
    while start >= 0:
        try:
            record = json.loads(line[start:])
        except json.JSONDecodeError:
            start = line.find('{"step"', start + 1)
            continue
        return (record if isinstance(record, dict) else None), int(start > 0)
    return None, 1


def _as_number(value: Any) -> float | None:
    """Returns a JSON value as a float: null and names such as "NaN" are non-finite. Returns None
    for what is no number.
    """
    if value is None:
        return math.nan
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, str):
        return _NON_FINITE.get(value.strip().lower())
    return None


def _columns(records: list[dict[str, Any]]) -> dict[str, Series]:
    steps: dict[str, list[int]] = {}
    values: dict[str, list[float]] = {}
    for record in records:
        for key, raw in record.items():
            value = _as_number(raw)
            if key == "step" or value is None:
                continue
            steps.setdefault(key, []).append(record["step"])
            values.setdefault(key, []).append(value)
    return {
        key: Series(np.asarray(steps[key], np.int64), np.asarray(values[key], np.float64))
        for key in steps
    }
