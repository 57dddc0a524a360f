"""Keeps scores above a quantile of a normal distribution with the row's moments.

Its name in the literature is statistical top-k.

Nothing is sorted: theta = mean + std * PhiInv(1 - r) of the row. As many neurons are kept as the
ratio says if the scores are about normal, as gate projections are (``mone.score=signed_gate``);
with other scores the density is what is measured.

With ``mone.rule_options.shifted`` theta is also taken from the gate projections, with its gradient,
so that a neuron begins from zero: act(relu(g - theta)).
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

from mone_megatron.methods.rule import Rows, Rule

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Options:
    """Holds the options."""

    shifted: bool = False
    """Whether theta is taken off the gate projections, too: act(relu(g - theta))."""


def statistical(rows: Rows) -> Tensor:
    """Returns True where a score is above theta; the moments are those of all ranks of a row."""
    if rows.budget.keep_ratio == 1:
        # Where a schedule of ratios begins or ends: no quantile is below every score.
        broken_T1 = rows.sum(rows.scores_TF.isnan().any(dim=-1, keepdim=True).float()) > 0
        return (~broken_T1).expand_as(rows.scores_TF)
    if rows.budget.options.shifted:
        # Scores of gate projections less theta; rows that hold a NaN have no other scores.
        return rows.scores_TF > 0
    return rows.scores_TF > threshold(rows)


def threshold(rows: Rows) -> Tensor:
    """Returns theta of each row, fp32 ``[T, 1]``."""
    neurons = rows.budget.neurons
    scores_TF = rows.scores_TF.float()
    mean_T1 = rows.sum(scores_TF.sum(dim=-1, keepdim=True)) / neurons
    squares_T1 = rows.sum((scores_TF - mean_T1).square().sum(dim=-1, keepdim=True))
    quantile = NormalDist().inv_cdf(1 - rows.budget.keep_ratio)
    # A NaN is passed on to the threshold, with which nothing compares.
    # No row is so even; one that is has a slope all the same.
    return mean_T1 + (squares_T1 / neurons).clamp_min(1e-30).sqrt() * quantile


METHOD = Rule(
    name="statistical",
    formula="scores above mean + std PhiInv(1 - r)",
    source="arXiv 2506.06644; Gemma 3n",
    mask=statistical,
    options=Options,
    shift=threshold,
    shift_option="shifted",
    score="signed_gate",
    fixed_count=False,
    exchange="sums",
)
