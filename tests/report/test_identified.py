"""Numbers that what was measured does not determine: thresholds, budgets, errors of one sample."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from mone_megatron.data.framing import Framing
from mone_megatron.evaluation.estimates import Difference, ratio
from mone_megatron.evaluation.evaluate import ModelResult
from mone_megatron.evaluation.harness import Score
from mone_megatron.evaluation.models import ModelFacts
from mone_megatron.evaluation.score_files import table
from mone_megatron.lab.sparsification.budget import Allotment, Probe
from mone_megatron.lab.sparsification.findings import (
    BudgetResult,
    BudgetSettings,
    Kind,
    Layer,
    Point,
    Study,
)
from mone_megatron.lab.sparsification.ranking import Rows
from mone_megatron.lab.sparsification.result_files import budget_json, report
from mone_megatron.lab.sparsification.statistics import LayerStatistics, Observer
from mone_megatron.report.formatting import plus_minus


def statistics_of(values_TF: torch.Tensor, tops: tuple[float, ...]) -> LayerStatistics:
    observer = Observer(0, "routed", values_TF.shape[1], torch.device("cpu"))
    observer(Rows(values_TF, values_TF, values_TF, lambda gate: gate, None, torch.Tensor))
    return observer.statistics(tops, len(values_TF))


def budget_of(shares: tuple[float, ...], pruned: float) -> BudgetResult:
    change = Difference(0.01, math.nan, True)
    return BudgetResult(
        settings=BudgetSettings(0.05, "abs_activation", (0.25, 0.5)),
        layers=tuple(range(len(shares))),
        loss=3.0,
        sensitivity=tuple((0.0, 0.01) for _ in shares),
        best=Probe(Allotment(shares, pruned, 0.01), 0.01),
        best_change=change,
        probes=(),
        uniform_change=change,
        elsewhere=None,
    )


def study_of(statistics: tuple[LayerStatistics, ...], budget: BudgetResult | None) -> Study:
    score = Score("text", "loss", ratio([3.0], [1]), False, None, "")
    dense = Point("none", 0.0, 0.0, (score,), (Difference(0.0, 0.0, True),))
    layers = (Layer(0, (Kind("routed", 8, 8, 2),)),)
    return Study("a", "nowhere", ("routed",), layers, 10, dense, (), statistics, budget)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        # A ReLU leaves three of four activations at 0: no threshold has half of them above it.
        ([0.0, 0.0, 0.0, 1.0], "fewer than 0.5"),
        ([0.0, 0.0, 0.0, 0.0], "fewer than 0.5"),
        ([1e-20, 1e-20, 1e-19, 1e-20], "fewer than 0.5"),
        ([1e9, 1e9, 1e8, 1.0], "more than 0.5"),
        ([0.1, 0.2, 0.3, 0.4], None),
        ([-0.1, 0.0, 0.3, 0.0], None),
    ],
)
def test_thresholds_at_the_edge_of_what_is_counted(values: list[float], reason: str | None) -> None:
    found = statistics_of(torch.tensor([values, values]), (0.5,))
    (threshold,) = found.thresholds
    assert [doubt.reason.startswith(reason or "-") for doubt in threshold.doubts] == (
        [True] if reason else []
    )
    text = report([study_of((found,), None)])
    assert ("not identified: layer 0 routed, top 0.5" in text) == bool(reason)
    assert LayerStatistics.from_json(found.to_json()) == found


@pytest.mark.parametrize(
    ("shares", "pruned", "reason"),
    [
        ((0.0, 0.0), 0.0, "nothing is pruned"),
        ((0.5, 0.5), 0.5, "every layer is at 0.5"),
        ((0.25, 0.5), 0.375, "1 of 2 layers are at 0.5"),
        ((0.25, 0.25), 0.25, None),
    ],
)
def test_budgets_that_end_at_what_was_tried(
    shares: tuple[float, ...], pruned: float, reason: str | None
) -> None:
    budget = budget_of(shares, pruned)
    text = report([study_of((), budget)])
    assert ("not identified" in text) == bool(reason)
    if reason:
        assert f"not identified: {reason}" in text
    assert bool(budget_json(budget)["not_identified"]) == bool(reason)


def test_errors_of_one_sample_are_unknown_and_not_nan() -> None:
    assert plus_minus("3.1", 0.25) == "3.1 ± 0.2500"
    assert plus_minus("3.1", 0.0, ".1f") == "3.1 ± 0.0"
    assert plus_minus("3.1", math.nan) == "3.1 (error unknown)"
    text = report([study_of((), budget_of((0.25,), 0.25))])
    assert "3.0000 (error unknown)" in text
    assert "+0.0100 (error unknown)" in text
    score = Score("text", "loss", ratio([3.0], [1]), False, None, "")
    facts = ModelFacts("nowhere", Path("nowhere"), None, 10, 16, None, Framing((), 0))  # type: ignore[arg-type]
    result = ModelResult("a", facts, "nowhere", "float32", 1, 0.0, [score], [])
    assert "3.0000 (error unknown)" in table([result], [])
