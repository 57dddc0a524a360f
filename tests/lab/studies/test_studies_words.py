"""What a study says in words: seeds that would tell, many comparisons at once, an order."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import pytest

from mone_megatron.lab.studies.outcome import Outcome, Variant
from mone_megatron.lab.studies.words import (
    conclusions,
    deviation,
    distinct_after_holm,
    seeds_to_see,
    smallest_seen,
)
from mone_megatron.planning.budget import Budget
from mone_megatron.report.stats import mean_interval


def variant(name: str, differences: tuple[float, ...], off_budget: float = 0.0) -> Variant:
    """A variant whose reference has a loss of 2 for every seed; () is the reference."""
    losses = tuple(2 + one for one in differences) or (2.0, 2.0, 2.0)
    return Variant(
        name=name,
        seeds=tuple(range(len(losses))),
        losses=losses,
        mean=mean_interval(losses),
        difference=mean_interval(differences) if differences else None,
        parameters=1000,
        budget=Budget(activated=500.0, decode_bytes=900.0, step_flops=3e6),
        realised_flops=4e6,
        off_budget=off_budget,
        differences=dict(enumerate(differences)),
        is_reference=not differences,
    )


def outcome(*variants: Variant) -> Outcome:
    return Outcome("x", "Which?", "r", 4096, "a machine", (variant("r", ()), *variants))


def test_the_deviation_of_an_interval_is_that_of_its_samples() -> None:
    samples = [0.1, 0.25, -0.3, 0.02]
    assert deviation(mean_interval(samples)) == pytest.approx(statistics.stdev(samples), rel=1e-4)
    assert math.isnan(deviation(mean_interval([0.1])))


@pytest.mark.parametrize(
    ("difference", "spread", "count"),
    # The sample sizes of a paired t-test in the books, for effects of 1, 0.5 and 0.2.
    [(1.0, 1.0, 10), (0.5, 1.0, 34), (0.01, 0.05, 199)],
)
def test_seeds_are_those_of_a_paired_test(difference: float, spread: float, count: int) -> None:
    assert seeds_to_see(difference, spread) == count
    assert smallest_seen(spread, count) <= difference < smallest_seen(spread, count - 1)


def test_more_seeds_than_anybody_trains_are_no_number() -> None:
    assert seeds_to_see(0.01, 1.0) is None
    assert seeds_to_see(0.01, math.nan) is None
    assert seeds_to_see(0.01, 0.0) == 2


def test_many_differences_are_asked_about_at_once() -> None:
    # t of 50 and of 4.8 with 2 degrees of freedom: p of 0.0004 and of 0.04.
    clear = variant("clear", (-0.99, -1.0, -1.06))
    borderline = variant("borderline", (0.1, 0.14, 0.2))
    noise = variant("noise", (-0.1, 0.1, 0.02))
    assert borderline.verdict == "higher"
    assert distinct_after_holm([noise, borderline, clear]) == [clear]
    assert distinct_after_holm([borderline]) == [borderline]
    told = " ".join(conclusions(outcome(noise, borderline, clear)))
    assert "Loss lower than that of r: clear." in told
    assert "3 differences are asked about at once" in told
    assert "(Holm) there remain: clear." in told
    assert "Within the noise of r: noise." in told
    assert f"{seeds_to_see(0.01, statistics.stdev((-0.1, 0.1, 0.02))):,} seeds" in told


def test_what_is_missing_or_off_budget_is_told() -> None:
    off = variant("off", (-0.5, -0.6, -0.7), off_budget=-0.04)
    one = variant("one", (-0.5,))
    partly = replace(
        outcome(off, one), missing=(("one", 2), ("one", 3), ("r", 3), ("never", 1), ("never", 2))
    )
    told = conclusions(partly)
    assert "Not trained yet: one (seeds 2, 3), r (seed 3), never (all seeds)." in told
    assert any("asks for: off (-4.0%)." in sentence for sentence in told)
    # One seed says nothing, and so nothing is said of it.
    assert not any("noise" in sentence for sentence in told)


def test_variants_are_ranked_with_the_reference_among_them() -> None:
    ranked = outcome(
        variant("off", (-0.5, -0.6), off_budget=0.02),
        variant("worse", (0.1, 0.2)),
        variant("diverged", (-0.1, math.nan)),
        variant("better", (-0.1, -0.2)),
    ).ranked
    assert [one.name for one in ranked] == ["better", "r", "worse", "diverged", "off"]
