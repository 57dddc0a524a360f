"""Compares runs: what makes them comparable, their figures side by side, replicates over seeds.

Losses of two runs say something about the models only if both saw the same data in the same
amounts. :func:`compare` checks that and names every difference; it never drops a run or a figure.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mone_megatron.report.plots import ComparedCurve
from mone_megatron.report.runs import Run, Series
from mone_megatron.report.stats import FloatArray, Interval, default_span, mean_interval

NOT_RECORDED = "not recorded"

# Keys in which replicates may differ; everything else has to be equal.
_REPLICATE_KEYS = frozenset({"train.seed", "run.name", "run.dir"})


def _tokens_per_step(run: Run) -> int | None:
    length, batch = run.setting("train.seq_length"), run.setting("train.global_batch_size")
    return length * batch if isinstance(length, int) and isinstance(batch, int) else None


# What must be equal for losses to be comparable. Seeds are checked apart: groups pool them.
_CHECKS: tuple[tuple[str, Callable[[Run], Any]], ...] = (
    ("data_fingerprint", lambda run: run.summary.data_fingerprint),
    ("vocab_size", lambda run: run.summary.vocab_size),
    ("train.seq_length", lambda run: run.setting("train.seq_length")),
    ("train.global_batch_size", lambda run: run.setting("train.global_batch_size")),
    ("tokens per step", _tokens_per_step),
    ("tokens", lambda run: run.tokens),
)


@dataclass(frozen=True)
class Mismatch:
    """Holds one reason why two runs (or groups) are not comparable."""

    key: str
    reference: str
    reference_value: Any
    label: str
    value: Any

    def __str__(self) -> str:
        """Returns text such as ``train.seq_length: 256 in moe, 512 in mone``."""
        if self.reference == self.label:
            return f"{self.key}: {self.value} in {self.label}"
        return (
            f"{self.key}: {self.reference_value} in {self.reference}, {self.value} in {self.label}"
        )


@dataclass(frozen=True)
class RunFigures:
    """Holds the figures of one run in a comparison.

    Attributes:
        label: distinct name.
        run: the run.
        train_loss: mean over the last 5% of its own steps.
        validation_loss: its last one; None when never evaluated.
        loss_difference: train loss minus the first run's, mean over the last 5% of their common
            steps; None for the first run and without common steps.
        tokens_per_second: median over steps.
        step_seconds: median over steps.
        step_time_ratio: `step_seconds` over the first run's.
    """

    label: str
    run: Run
    train_loss: float
    validation_loss: float | None
    loss_difference: float | None
    tokens_per_second: float | None
    step_seconds: float | None
    step_time_ratio: float | None

    @property
    def parameters(self) -> Mapping[str, int]:
        """Returns the counts of parameters, of activated ones as measured if they were."""
        return self.run.parameters


@dataclass(frozen=True)
class Group:
    """Holds runs that are equal but for seed, name and folder.

    Attributes:
        label: common start of the members' labels.
        members: the runs.
        train_loss, validation_loss, tokens_per_second, step_seconds: mean and 95% t-interval over
            the members; None when a member lacks the figure.
        loss_difference: paired by seed: the member's loss minus that of the first group's member
            with its seed; None for the first group and where the seeds are not the same.
    """

    label: str
    members: tuple[RunFigures, ...]
    train_loss: Interval
    validation_loss: Interval | None
    tokens_per_second: Interval | None
    step_seconds: Interval | None
    loss_difference: Interval | None

    @property
    def seeds(self) -> tuple[int | None, ...]:
        """Returns the seeds of the members, in order of the members."""
        return tuple(member.run.seed for member in self.members)


@dataclass(frozen=True)
class Comparison:
    """Holds runs side by side, and whether their losses may be compared.

    Attributes:
        figures: one entry a run, in the order given; the first is the reference.
        groups: replicates pooled over seeds; empty unless asked for.
        mismatches: why the runs are not comparable; empty when they are.
        config_differences: dotted configuration keys that are not the same in all runs, with the
            value of each run (None where the key is absent); run.name and run.dir left out.
    """

    figures: tuple[RunFigures, ...]
    groups: tuple[Group, ...]
    mismatches: tuple[Mismatch, ...]
    config_differences: Mapping[str, tuple[Any, ...]]

    @property
    def comparable(self) -> bool:
        """Returns whether nothing that must be equal differs."""
        return not self.mismatches


def compare(
    runs: Sequence[Run], labels: Sequence[str] | None = None, *, group_seeds: bool = False
) -> Comparison:
    """Puts runs side by side and checks that their losses may be compared.

    Args:
        runs: the first is the reference of ratios and differences.
        labels: one distinct label a run; None takes the runs' names.
        group_seeds: pool runs that differ only in ``train.seed``, ``run.name`` and ``run.dir``;
            groups are then comparable when they hold the same seeds.

    Raises:
        ValueError: no runs, or labels that are not one a run and distinct.
    """
    if not runs:
        raise ValueError("no runs to compare: give at least one run directory")
    names = _labels(runs, labels)
    first = runs[0]
    reference_seconds = first.median("step_seconds")
    figures = []
    for index, (name, run) in enumerate(zip(names, runs, strict=True)):
        seconds = run.median("step_seconds")
        ratio = seconds / reference_seconds if seconds and reference_seconds else None
        figures.append(
            RunFigures(
                label=name,
                run=run,
                train_loss=run.final_train_loss,
                validation_loss=run.final_validation_loss,
                loss_difference=_final_difference(run, first) if index else None,
                tokens_per_second=run.median("tokens_per_second"),
                step_seconds=seconds,
                step_time_ratio=ratio,
            )
        )
    groups = _groups(figures) if group_seeds else ()
    return Comparison(
        figures=tuple(figures),
        groups=groups,
        mismatches=tuple([*_mismatches(figures), *_seed_mismatches(figures, groups)]),
        config_differences=_config_differences(runs),
    )


def compared_curves(comparison: Comparison) -> list[ComparedCurve]:
    """Returns the curves to overlay: one a group where seeds are pooled, else one a run.

    All are smoothed over the same span, that of the longest run, so that none looks calmer only
    for being shorter.
    """
    pools = [(group.label, group.members) for group in comparison.groups]
    if not pools:
        pools = [(figure.label, (figure,)) for figure in comparison.figures]
    span = default_span(max(len(figure.run.series("loss")) for figure in comparison.figures))
    reference: Series | None = None
    curves = []
    for label, members in pools:
        losses = _stack([member.run.series("loss") for member in members])
        if losses is None:
            continue
        steps, rows = losses
        smooth = np.stack([Series(steps, row).smoothed(span).values for row in rows])
        mean = Series(steps, rows.mean(axis=0))
        several = len(members) > 1
        evaluated = [m.run.series("val_loss") for m in members if m.run.has("val_loss")]
        validation = _stack(evaluated) if len(evaluated) == len(members) else None
        difference = difference_series(mean, reference) if reference is not None else None
        curves.append(
            ComparedCurve(
                label=f"{label} ({len(members)} seeds)" if several else label,
                loss=Series(steps, smooth.mean(axis=0)),
                low=smooth.min(axis=0) if several else None,
                high=smooth.max(axis=0) if several else None,
                validation=(
                    Series(validation[0], validation[1].mean(axis=0)) if validation else None
                ),
                difference=difference.smoothed(span) if difference is not None else None,
            )
        )
        reference = mean if reference is None else reference
    return curves


def difference_series(series: Series, reference: Series) -> Series | None:
    """Returns `series` minus `reference` on their common steps; None when they have none."""
    steps = np.intersect1d(series.steps, reference.steps)
    if not len(steps):
        return None
    return Series(steps, series.on(steps).values - reference.on(steps).values)


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields dotted keys and values of nested mappings; an empty mapping is a value."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _final_difference(run: Run, reference: Run) -> float | None:
    difference = difference_series(run.series("loss"), reference.series("loss"))
    return difference.tail_mean() if difference is not None else None


def _stack(series: Sequence[Series]) -> tuple[np.ndarray, FloatArray] | None:
    """Returns common steps ``[n]`` and values ``[len(series), n]``; None without a common step."""
    steps = series[0].steps
    for one in series[1:]:
        steps = np.intersect1d(steps, one.steps)
    if not len(steps):
        return None
    return steps, np.stack([one.on(steps).values for one in series])


def _labels(runs: Sequence[Run], labels: Sequence[str] | None) -> list[str]:
    if labels is not None:
        if len(labels) != len(runs):
            raise ValueError(
                f"--labels gives {len(labels)} labels for {len(runs)} runs: give one for each"
            )
        if len(set(labels)) != len(labels):
            raise ValueError("--labels repeats a label: give each run its own")
        return list(labels)
    names = [run.name for run in runs]
    for spell in (lambda run: f"{run.name} ({run.path.name})", lambda run: str(run.path)):
        folders: dict[str, set[Path]] = {}
        for name, run in zip(names, runs, strict=True):
            folders.setdefault(name, set()).add(run.path)
        names = [
            spell(run) if len(folders[name]) > 1 else name
            for name, run in zip(names, runs, strict=True)
        ]
    seen: Counter[str] = Counter()
    for index, name in enumerate(names):
        seen[name] += 1
        names[index] = f"{name} #{seen[name]}" if seen[name] > 1 else name
    return names


def _mismatches(figures: Sequence[RunFigures]) -> Iterator[Mismatch]:
    """Yields the checked keys of every later run that differ from the first run's."""
    first = figures[0]
    for key, read in _CHECKS:
        expected = read(first.run)
        for other in figures[1:]:
            value = read(other.run)
            # What was not recorded cannot be said to be equal.
            if expected is None or expected != value:
                yield Mismatch(key, first.label, _shown(expected), other.label, _shown(value))


def _seed_mismatches(figures: Sequence[RunFigures], groups: Sequence[Group]) -> Iterator[Mismatch]:
    if not groups:
        first = figures[0]
        for other in figures[1:]:
            if first.run.seed is None or first.run.seed != other.run.seed:
                yield Mismatch(
                    "seed", first.label, _shown(first.run.seed), other.label, _shown(other.run.seed)
                )
        return
    for group in groups:
        repeated = sorted({str(seed) for seed in group.seeds if group.seeds.count(seed) > 1})
        if repeated:
            # Copies of one run would make the interval too narrow.
            yield Mismatch("repeated seeds", group.label, "", group.label, ", ".join(repeated))
    expected = _seed_list(groups[0])
    for group in groups[1:]:
        if _seed_list(group) != expected:
            yield Mismatch("seeds", groups[0].label, expected, group.label, _seed_list(group))


def _seed_list(group: Group) -> str:
    return ", ".join(sorted((str(_shown(seed)) for seed in group.seeds), key=lambda s: (len(s), s)))


def _shown(value: Any) -> Any:
    return NOT_RECORDED if value is None else value


def _config_differences(runs: Sequence[Run]) -> dict[str, tuple[Any, ...]]:
    flat = [dict(flatten(run.config)) for run in runs]
    keys = list(dict.fromkeys(key for config in flat for key in config))
    found = {}
    for key in keys:
        values = tuple(config.get(key) for config in flat)
        if key not in ("run.name", "run.dir") and any(value != values[0] for value in values[1:]):
            found[key] = values
    return found


def _replicate_key(run: Run) -> str:
    """Returns text that is equal for runs of the same experiment under other seeds."""
    config = {key: value for key, value in flatten(run.config) if key not in _REPLICATE_KEYS}
    return json.dumps([config, run.summary.data_fingerprint], sort_keys=True, default=str)


def _groups(figures: Sequence[RunFigures]) -> tuple[Group, ...]:
    pools: dict[str, list[RunFigures]] = {}
    for figure in figures:
        pools.setdefault(_replicate_key(figure.run), []).append(figure)
    groups: list[Group] = []
    first = next(iter(pools.values()))
    for index, members in enumerate(pools.values()):
        label = _common_label([member.label for member in members])
        if label in {group.label for group in groups}:
            label = f"{label} #{index + 1}"
        groups.append(
            Group(
                label=label,
                members=tuple(members),
                train_loss=mean_interval([member.train_loss for member in members]),
                validation_loss=_interval([member.validation_loss for member in members]),
                tokens_per_second=_interval([member.tokens_per_second for member in members]),
                step_seconds=_interval([member.step_seconds for member in members]),
                loss_difference=_paired_difference(members, first) if index else None,
            )
        )
    return tuple(groups)


def _interval(samples: Sequence[float | None]) -> Interval | None:
    known = [sample for sample in samples if sample is not None]
    return mean_interval(known) if len(known) == len(samples) else None


def _paired_difference(
    members: Sequence[RunFigures], reference: Sequence[RunFigures]
) -> Interval | None:
    """Returns the interval of the loss differences of runs that share a seed, which cancels its
    effect; None when the seeds are not the same and distinct.
    """
    by_seed = {member.run.seed: member.run for member in reference}
    seeds = {member.run.seed for member in members}
    distinct = len(by_seed) == len(reference) and len(seeds) == len(members)
    if not distinct or seeds != set(by_seed):
        return None
    return _interval(
        [_final_difference(member.run, by_seed[member.run.seed]) for member in members]
    )


def _common_label(labels: Sequence[str]) -> str:
    """Returns the common start of labels: ``moe_seed1, moe_seed2`` -> ``moe``."""
    if len(labels) == 1:
        return labels[0]
    same = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*labels, strict=False))
    common = "".join(letters[0] for letters in same)
    if any(label[len(common) : len(common) + 1].isdigit() for label in labels):
        # Seeds 10 and 11 share a digit that belongs to neither name.
        common = common.rstrip("0123456789")
    common = re.sub(r"[ _.(#-]+(seed|s)[ _.=-]*$", "", common).rstrip(" _.-(#")
    return common or labels[0]
