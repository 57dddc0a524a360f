"""Says what a study's runs show: means over seeds, and differences seed by seed, with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mone_megatron.lab.studies.definition import Study
from mone_megatron.lab.studies.runner import places
from mone_megatron.report.compare import finite_or_none
from mone_megatron.report.identified import Doubt, few_samples
from mone_megatron.report.runs import Run, load_run
from mone_megatron.report.stats import Interval, mean_interval

METRIC = "val_loss"
# Of two seeds the interval rests on one difference between them.
_ENOUGH_SEEDS = 3


def _interval_json(interval: Interval) -> dict[str, Any]:
    return {name: finite_or_none(value) for name, value in asdict(interval).items()}


@dataclass(frozen=True)
class Variant:
    """Holds what was measured of one variant over its seeds."""

    name: str
    seeds: tuple[int, ...]
    # The last validation loss of each seed, in nats a token.
    losses: tuple[float, ...]
    mean: Interval
    # Its losses less the reference's of the same seeds; None for the reference itself.
    difference: Interval | None
    parameters: int
    activated: int

    @property
    def verdict(self) -> str:
        """Returns the verdict in words, by whether the interval of the difference holds 0."""
        if self.difference is None:
            return "reference"
        if not math.isfinite(self.difference.mean):
            return "a loss is not finite"
        if not math.isfinite(self.difference.half_width):
            return "one seed says nothing"
        if self.difference.high < 0:
            return "lower"
        if self.difference.low > 0:
            return "higher"
        return "no difference seen"

    @property
    def doubts(self) -> list[Doubt]:
        """Returns why the difference is not identified.

        It is empty for the reference, and where the difference is identified.
        """
        if self.difference is None:
            return []
        found = few_samples(self.difference.count, _ENOUGH_SEEDS, "seed", "seeds")
        if not math.isfinite(self.difference.mean):
            found.append(Doubt("missing", "a loss is not finite"))
        return found

    def to_json(self) -> dict[str, Any]:
        """Returns the variant for files; numbers that are not finite are null."""
        return {
            **asdict(self),
            "losses": [finite_or_none(loss) for loss in self.losses],
            "mean": _interval_json(self.mean),
            "difference": None if self.difference is None else _interval_json(self.difference),
            "not_identified": [doubt.reason for doubt in self.doubts],
        }


@dataclass(frozen=True)
class Outcome:
    """Holds the outcome of a study."""

    name: str
    question: str
    reference: str
    tokens: int
    hardware: str
    variants: tuple[Variant, ...]

    @property
    def size(self) -> str:
        """Returns how much was trained, in words."""
        return f"{len(self.variants[0].seeds)} seeds, {self.tokens:,} tokens each"

    def to_json(self) -> dict[str, Any]:
        """Returns the outcome for files, with the verdicts."""
        return asdict(self) | {
            "variants": [variant.to_json() for variant in self.variants],
            "metric": METRIC,
            "verdicts": {variant.name: variant.verdict for variant in self.variants},
        }


def read_outcome(study: Study, output: Path, seeds: Sequence[int]) -> Outcome:
    """Reads a study's runs and returns what they say.

    Args:
        study: checked.
        output: its folder.
        seeds: of each variant.

    Raises:
        ValueError: when a run is missing or has no validation loss, naming it.
    """
    runs = places(study, output, seeds)
    if missing := [run for run in runs if not run.done]:
        raise ValueError(
            f"{missing[0].folder}: not trained to its end ({len(missing)} of {len(runs)} are "
            "missing); run the study without --report"
        )
    loaded = {(run.variant, run.seed): load_run(run.folder) for run in runs}
    losses = {key: _final_loss(run) for key, run in loaded.items()}
    first = loaded[study.reference, seeds[0]]
    return Outcome(
        name=study.name,
        question=study.question,
        reference=study.reference,
        tokens=first.summary.tokens or 0,
        hardware=first.summary.hardware or "unknown",
        variants=tuple(
            _variant(study, name, seeds, losses, loaded[name, seeds[0]]) for name in study.variants
        ),
    )


def _final_loss(run: Run) -> float:
    if METRIC not in run.columns:
        raise ValueError(f"{run.path}: has no {METRIC}; set train.eval_interval")
    return float(run.columns[METRIC].values[-1])


def _variant(
    study: Study,
    name: str,
    seeds: Sequence[int],
    losses: dict[tuple[str, int], float],
    run: Run,
) -> Variant:
    own = [losses[name, seed] for seed in seeds]
    difference = None
    if name != study.reference:
        others = [losses[study.reference, seed] for seed in seeds]
        difference = mean_interval([a - b for a, b in zip(own, others, strict=True)])
    return Variant(
        name=name,
        seeds=tuple(seeds),
        losses=tuple(own),
        mean=mean_interval(own),
        difference=difference,
        parameters=run.summary.parameters["total"],
        activated=run.summary.parameters["activated_gate_counted"],
    )
