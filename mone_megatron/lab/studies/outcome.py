"""Says what a study's runs show: means over seeds, and differences seed by seed, with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from mone_megatron.config.schema import Config
from mone_megatron.lab.studies.definition import EQUAL_WITHIN, Study
from mone_megatron.lab.studies.runner import places
from mone_megatron.lab.studies.usage import usage_of
from mone_megatron.planning.budget import Budget, budget_of
from mone_megatron.planning.plan import vocabulary_of
from mone_megatron.report.identified import Doubt, few_samples
from mone_megatron.report.runs import Run, load_run
from mone_megatron.report.stats import Interval, mean_interval

METRIC = "val_loss"
# Of two seeds the interval rests on one difference between them.
_ENOUGH_SEEDS = 3


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
    # What a token cost at the end of training, mean over the seeds.
    budget: Budget
    # By what share its budget is off the reference's, where the study asks for equal ones.
    off_budget: float = 0.0

    @property
    def verdict(self) -> str:
        """Returns the verdict in words, by whether the interval of the difference holds 0."""
        if self.difference is None:
            return "reference"
        if self.is_off_budget:
            return f"not compared: its budget is {self.off_budget:+.1%} off"
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
    def is_off_budget(self) -> bool:
        """Returns whether its budget is not what the study asks for."""
        return abs(self.off_budget) > EQUAL_WITHIN

    @property
    def compared(self) -> Interval | None:
        """Returns the difference where there is one that may be looked at."""
        return None if self.is_off_budget else self.difference

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
        """Returns the variant for files, with why its difference is not identified."""
        return asdict(self) | {"not_identified": [doubt.reason for doubt in self.doubts]}


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
    budgets = {
        name: _budget(study.configs[name], [loaded[name, seed] for seed in seeds])
        for name in study.variants
    }
    return Outcome(
        name=study.name,
        question=study.question,
        reference=study.reference,
        tokens=first.summary.tokens or 0,
        hardware=first.summary.hardware or "unknown",
        variants=tuple(
            Variant(
                name=name,
                seeds=tuple(seeds),
                losses=tuple(losses[name, seed] for seed in seeds),
                mean=mean_interval([losses[name, seed] for seed in seeds]),
                difference=_difference(study, name, seeds, losses),
                parameters=loaded[name, seeds[0]].summary.parameters["total"],
                budget=budgets[name],
                off_budget=_off_budget(study, budgets[name], budgets[study.reference]),
            )
            for name in study.variants
        ),
    )


def _final_loss(run: Run) -> float:
    if METRIC not in run.columns:
        raise ValueError(f"{run.path}: has no {METRIC}; set train.eval_interval")
    return float(run.columns[METRIC].values[-1])


def _difference(
    study: Study, name: str, seeds: Sequence[int], losses: Mapping[tuple[str, int], float]
) -> Interval | None:
    if name == study.reference:
        return None
    return mean_interval([losses[name, seed] - losses[study.reference, seed] for seed in seeds])


def _budget(config: Config, runs: Sequence[Run]) -> Budget:
    """Returns the mean of what a token cost in the runs of one variant."""
    vocab_size = runs[0].summary.vocab_size or vocabulary_of(config)
    found = [asdict(budget_of(config, vocab_size, usage_of(config, run))) for run in runs]
    return Budget(**{name: fmean(one[name] for one in found) for name in found[0]})


def _off_budget(study: Study, own: Budget, reference: Budget) -> float:
    """Returns by what share the number that must be equal is off; 0 where none must be."""
    if study.equal == "activated":
        return own.activated / reference.activated - 1
    if study.equal == "flops":
        return own.step_flops / reference.step_flops - 1
    assert study.equal in ("total", ""), study.equal
    return 0.0
