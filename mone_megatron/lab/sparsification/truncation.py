"""Truncates tails: CETT, and the sparsity at which perplexity rises by p% (PPL-p%).

After "Sparsing Law" (Luo et al., arXiv 2411.02335), which has it of dense MLPs. A neuron adds
n_i = p a u Wd_i to the output of its layer, with p the router's weight of its expert (1 in a dense
MLP). For a threshold, the tail of a token is the set D of its neurons with ||n_i|| not above it,
over all of its experts. Its relative error is

    || sum over D of n_i ||_2  /  || output of the layer ||_2

and the cumulative error of tail truncation (CETT) of the threshold is the mean of that over tokens.
Each layer gets the largest threshold with a CETT of at most the one that is asked for; PPL-p% looks
for the CETT at which the perplexity rises by p%, by bisection to 0.001.

Errors are those of the unpruned model's hidden states, at thresholds that a grid of shares of the
contributions lies below.

Shape suffixes: T rows (a token once for each of its experts), F neurons of one expert, N tokens, H
hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mone_megatron.evaluation.estimates import Difference, difference
from mone_megatron.evaluation.harness import Score
from mone_megatron.lab.sparsification.calibration import Calibration
from mone_megatron.lab.sparsification.engine import Text
from mone_megatron.lab.sparsification.findings import Truncation
from mone_megatron.lab.sparsification.plans import CETT, CONTRIBUTION, Cut, Made, Plan, dense
from mone_megatron.lab.sparsification.ranking import Choose, Rows, score_rows
from mone_megatron.lab.sparsification.thresholds import ScoreCounts
from mone_megatron.lab.sparsification.use import Use

# Shares of a layer's contributions that thresholds are tried at, beside those that are zero: where
# few are left, each step takes a seventh of them.
GRID = (
    *(step / 20 for step in range(1, 10)),
    *(step / 40 for step in range(20, 37)),
    *(1 - 0.1 * 0.85**step for step in range(1, 15)),
)
# The bisection ends when it knows the CETT so well.
_TOLERANCE = 0.001


class TailErrors:
    """Adds up the errors of truncation at some thresholds; it is a ``ranking.Choose``."""

    def __init__(self, thresholds: Sequence[float]) -> None:
        self._thresholds = tuple(thresholds)
        self._sums = [0.0] * len(self._thresholds)
        self._tokens = 0

    def __call__(self, rows: Rows) -> None:
        """Adds the errors of some tokens; all neurons stay."""
        hidden_TF = rows.hidden_TF
        if rows.own_TF is not None:
            hidden_TF = hidden_TF * rows.own_TF
        size_TF = score_rows(CONTRIBUTION, rows).float()
        assert rows.down is not None, "places give it"
        bias_TH = rows.down(torch.zeros_like(hidden_TF))
        whole_N = _by_token(rows, rows.down(hidden_TF)).norm(dim=-1)
        for place, threshold in enumerate(self._thresholds):
            tail_TH = rows.down(hidden_TF * (size_TF <= threshold)) - bias_TH
            tail_N = _by_token(rows, tail_TH).norm(dim=-1)
            # A layer that adds nothing loses nothing.
            self._sums[place] += float(torch.where(whole_N > 0, tail_N / whole_N, 0).sum())
        self._tokens += len(whole_N)

    def errors(self) -> list[float]:
        """Returns the mean error over tokens at each threshold."""
        return [total / self._tokens for total in self._sums]


def _by_token(rows: Rows, output_TH: Tensor) -> Tensor:
    """Returns the layer's output of each token, ``[N, H]`` fp32, of its experts' outputs."""
    if rows.routed is None:
        return output_TH.float()
    weighted_TH = output_TH.float() * rows.routed.weight_T.float().unsqueeze(-1)
    tokens = int(rows.routed.token_T.max()) + 1
    by_token_NH = weighted_TH.new_zeros(tokens, weighted_TH.shape[-1])
    return by_token_NH.index_add_(0, rows.routed.token_T, weighted_TH)


@dataclass(frozen=True)
class ErrorCurve:
    """Holds the errors of one place, by threshold, ascending."""

    thresholds: tuple[float, ...]
    errors: tuple[float, ...]

    def threshold_at(self, cett: float) -> float:
        """Returns the largest threshold up to which every one has an error of at most ``cett``."""
        found = self.thresholds[0]
        for threshold, error in zip(self.thresholds, self.errors, strict=True):
            if error > cett:
                break
            found = threshold
        return found


def error_curves(calibration: Calibration) -> list[list[ErrorCurve]]:
    """Returns the errors of every place of every layer, measured unless kept."""
    key = calibration.key(errors="tail", grid=list(GRID))
    if calibration.results.get(key) is None:
        places = list(calibration.places())
        counts = {place: ScoreCounts(CONTRIBUTION, place[0], 1) for place in places}
        watchers: dict[tuple[int, int], Choose] = dict(counts)
        calibration.watch(watchers, "contributions of neurons")
        # What adds nothing goes without an error.
        tails = {place: TailErrors((0.0, *counts[place].quantiles(GRID))) for place in places}
        calibration.watch(dict(tails), "errors of truncation")
        curves = [
            [
                {
                    "thresholds": [0.0, *counts[layer.number, index].quantiles(GRID)],
                    "errors": tails[layer.number, index].errors(),
                }
                for index in range(len(layer.kinds))
            ]
            for layer in calibration.layers
        ]
        calibration.results.add(key, {"layers": curves})
    return calibration.results.read(key, _curves)


def _curves(kept: dict[str, Any]) -> list[list[ErrorCurve]]:
    return [
        [ErrorCurve(tuple(place["thresholds"]), tuple(place["errors"])) for place in layer]
        for layer in kept["layers"]
    ]


def cett_plan(curves: Sequence[Sequence[ErrorCurve]], cett: float) -> Plan:
    """Returns the plan in which every layer truncates as much as a CETT allows."""
    choices = tuple(
        Cut(CONTRIBUTION, tuple((curve.threshold_at(cett),) for curve in layer)) if layer else None
        for layer in curves
    )
    return Plan(CONTRIBUTION, (0.0,) * len(curves), Made(CETT, f"{cett:g}", choices))


# Measures plans on a text, unless that was done before.
Measure = Callable[[Sequence[Plan], Text], dict[Plan, tuple[Score, ...]]]


@dataclass(frozen=True)
class Truncator:
    """Truncates a model.

    Attributes:
        calibration: on what thresholds are set, and on what the rise of the perplexity is judged.
        text: of the study.
        measure: measures plans.
        use: says what a plan computes of the text of the study.
    """

    calibration: Calibration
    text: Text
    measure: Measure
    use: Callable[[Plan], Use]

    def truncations(self, cetts: Sequence[float], rises: Sequence[float]) -> tuple[Truncation, ...]:
        """Returns what each CETT does, and each that is found for a rise in percent."""
        curves = error_curves(self.calibration)
        found = [self._truncation(curves, cett, cett, None) for cett in cetts]
        for rise in rises:
            found.append(self._truncation(curves, self.search(curves, rise), None, rise))
        return tuple(found)

    def search(self, curves: Sequence[Sequence[ErrorCurve]], rise: float) -> float:
        """Returns the largest CETT with which the perplexity rises by at most ``rise`` percent.

        On the calibration text, by bisection.
        """
        low, high = 0.0, 1.0
        while high - low > _TOLERANCE:
            middle = (low + high) / 2
            if self._rise(cett_plan(curves, middle), self.calibration.text) <= rise:
                low = middle
            else:
                high = middle
        return low

    def _truncation(
        self,
        curves: Sequence[Sequence[ErrorCurve]],
        cett: float,
        asked: float | None,
        rise: float | None,
    ) -> Truncation:
        plan = cett_plan(curves, cett)
        assert plan.made is not None
        return Truncation(
            asked=asked,
            rise=rise,
            cett=cett,
            calibrated=self._rise(plan, self.calibration.text),
            measured=self._rise(plan, self.text),
            change=self._change(plan, self.text),
            use=self.use(plan),
            thresholds=tuple(
                tuple(of_place for (of_place,) in choice.thresholds)
                if isinstance(choice, Cut)
                else ()
                for choice in plan.made.choices
            ),
        )

    def _change(self, plan: Plan, text: Text) -> Difference:
        nothing = dense(len(plan.shares))
        found = self.measure([nothing, plan], text)
        one, other = found[plan][0], found[nothing][0]
        assert one.metric == "loss", one.metric
        return difference(one.estimate, other.estimate, same_samples=one.samples == other.samples)

    def _rise(self, plan: Plan, text: Text) -> float:
        change = self._change(plan, text).value
        return 100 * math.expm1(change) if change < 700 else math.inf
