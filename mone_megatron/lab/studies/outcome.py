"""Says what a study's runs show: means over seeds, and differences seed by seed, with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from mone_megatron.config.schema import Config
from mone_megatron.counting import counted
from mone_megatron.lab.studies.definition import EQUAL_WITHIN, Study
from mone_megatron.lab.studies.runner import Place, places
from mone_megatron.planning.budget import Budget, budget_of
from mone_megatron.planning.plan import vocabulary_of
from mone_megatron.report.identified import Doubt, few_samples
from mone_megatron.report.runs import Run, load_run
from mone_megatron.report.stats import Interval, mean_interval
from mone_megatron.report.usage import usage_of

METRIC = "val_loss"
# Of two seeds the interval rests on one difference between them.
_ENOUGH_SEEDS = 3
# A step's seconds are taken at this share of a run's steps, from the fastest: other processes of a
# shared machine make steps slower, never faster.
_UNDISTURBED = 0.1


@dataclass(frozen=True)
class Variant:
    """Holds what was measured of one variant over its seeds."""

    name: str
    seeds: tuple[int, ...]
    # The last validation loss of each seed, in nats a token.
    losses: tuple[float, ...]
    mean: Interval
    # The mean of its losses less the reference's of the same seeds; None for the reference itself
    # and where no seed of both is trained.
    difference: Interval | None
    parameters: int
    # What a token cost at the end of training, mean over the seeds.
    budget: Budget
    # Operations that a training step computed, whether the method needs them or not.
    realised_flops: float
    # By what share its budget is off the reference's, where the study asks for equal ones.
    off_budget: float = 0.0
    # Its losses less the reference's, by the seeds that both have.
    differences: Mapping[int, float] = field(default_factory=dict)
    # Of its fastest run, that of a step that little else on the machine disturbed.
    step_seconds: float | None = None
    is_reference: bool = False

    @property
    def verdict(self) -> str:
        """Returns the verdict in words, by whether the interval of the difference holds 0."""
        if self.is_reference:
            return "reference"
        if self.difference is None:
            return "no seed in common"
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
    # The runs, by variant and seed, that were asked for and are not trained to their end.
    missing: tuple[tuple[str, int], ...] = ()

    @property
    def size(self) -> str:
        """Returns how much was trained, in words."""
        fewest, most = (f(len(one.seeds) for one in self.variants) for f in (min, max))
        seeds = counted(most, "seed") if fewest == most else f"{fewest} to {most} seeds"
        return f"{seeds}, {self.tokens:,} tokens each"

    @property
    def reference_variant(self) -> Variant:
        """Returns the variant that the others are compared with."""
        return next(one for one in self.variants if one.name == self.reference)

    @property
    def ranked(self) -> list[Variant]:
        """Returns the variants from the lowest mean difference up, the reference among them at 0;
        after them those whose difference is not finite, and those of another budget.
        """

        def key(one: Variant) -> tuple[int, float]:
            mean = 0.0 if one.name == self.reference else math.nan
            if one.difference is not None:
                mean = one.difference.mean
            known = math.isfinite(mean)
            return 2 if one.is_off_budget else int(not known), mean if known else 0.0

        return sorted(self.variants, key=key)

    def step_ratio(self, variant: Variant) -> float | None:
        """Returns the seconds of a training step over the reference's; None when not known."""
        own, other = variant.step_seconds, self.reference_variant.step_seconds
        return own / other if own and other else None

    def flops_ratio(self, variant: Variant) -> float:
        """Returns the operations that a training step computed over the reference's."""
        return variant.realised_flops / self.reference_variant.realised_flops

    def to_json(self) -> dict[str, Any]:
        """Returns the outcome for files, with the verdicts."""
        return asdict(self) | {
            "variants": [variant.to_json() for variant in self.variants],
            "metric": METRIC,
            "verdicts": {variant.name: variant.verdict for variant in self.variants},
        }


def read_outcome(study: Study, output: Path, seeds: Sequence[int]) -> Outcome:
    """Reads a study's runs and returns what those say that are trained to their end.

    Args:
        study: checked.
        output: its folder.
        seeds: of each variant. A variant without any of them trained is left out, and named in
            ``missing``.

    Raises:
        ValueError: when no run of the reference, or of nothing else, is trained to its end, or one
            has no validation loss, naming it.
    """
    runs = places(study, output, seeds)
    done = {(run.variant, run.seed): run for run in runs if run.done}
    _check_enough(study, runs)
    loaded = {key: load_run(run.folder) for key, run in done.items()}
    losses = {key: _final_loss(run) for key, run in loaded.items()}
    of_variant = {
        name: {seed: loaded[name, seed] for seed in seeds if (name, seed) in loaded}
        for name in study.variants
    }
    of_variant = {name: found for name, found in of_variant.items() if found}
    reference = of_variant[study.reference]
    budgets = {
        name: _budget(study.configs[name], list(found.values()))
        for name, found in of_variant.items()
    }
    variants = []
    for name, found in of_variant.items():
        differences = {
            seed: losses[name, seed] - losses[study.reference, seed]
            for seed in found
            if seed in reference and name != study.reference
        }
        summary = next(iter(found.values())).summary
        variants.append(
            Variant(
                name=name,
                seeds=tuple(found),
                losses=tuple(losses[name, seed] for seed in found),
                mean=mean_interval([losses[name, seed] for seed in found]),
                difference=mean_interval(list(differences.values())) if differences else None,
                parameters=summary.parameters["total"],
                budget=budgets[name],
                realised_flops=summary.flops_per_step["realised"],
                off_budget=_off_budget(study, budgets[name], budgets[study.reference]),
                differences=differences,
                step_seconds=_step_seconds(list(found.values())),
                is_reference=name == study.reference,
            )
        )
    first = next(iter(reference.values()))
    return Outcome(
        name=study.name,
        question=study.question,
        reference=study.reference,
        tokens=first.summary.tokens or 0,
        hardware=first.summary.hardware or "unknown",
        variants=tuple(variants),
        missing=tuple((run.variant, run.seed) for run in runs if not run.done),
    )


def _check_enough(study: Study, runs: Sequence[Place]) -> None:
    """Refuses runs of which there is nothing to compare yet."""
    missing = [run for run in runs if not run.done]
    is_there = {run.variant for run in runs if run.done}
    if study.reference not in is_there or len(is_there) < 2:
        lacking = [run for run in missing if run.variant not in is_there]
        needed = [run for run in lacking if run.variant == study.reference] or lacking
        raise ValueError(
            f"{needed[0].folder}: not trained to its end ({len(missing)} of {len(runs)} are "
            "missing); run the study without --report"
        )


def _step_seconds(runs: Sequence[Run]) -> float | None:
    found = [run.columns["step_seconds"].values for run in runs if run.has("step_seconds")]
    return min((float(np.quantile(one, _UNDISTURBED)) for one in found), default=None)


def _final_loss(run: Run) -> float:
    if METRIC not in run.columns:
        raise ValueError(f"{run.path}: has no {METRIC}; set train.eval_interval")
    return float(run.columns[METRIC].values[-1])


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
