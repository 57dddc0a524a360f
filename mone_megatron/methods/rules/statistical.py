"""Keeps scores above a quantile of a normal distribution with the row's moments.

Its name in the literature is statistical top-k.

Nothing is sorted: theta = mean + std * PhiInv(1 - r) of the row. As many neurons are kept as the
ratio says if the scores are about normal, as gate projections are (``mone.score=signed_gate``);
with other scores the density is what is measured.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import TYPE_CHECKING

from mone_megatron.methods.rule import Rows, Rule

if TYPE_CHECKING:
    from torch import Tensor


def statistical(rows: Rows) -> Tensor:
    """Returns True where a score is above theta; the moments are those of all ranks of a row."""
    if rows.budget.keep_ratio == 1:
        # Where a schedule of ratios begins or ends: no quantile is below every score.
        broken_T1 = rows.sum(rows.scores_TF.isnan().any(dim=-1, keepdim=True).float()) > 0
        return (~broken_T1).expand_as(rows.scores_TF)
    return rows.scores_TF > threshold(rows)


def threshold(rows: Rows) -> Tensor:
    """Returns theta of each row, fp32 ``[T, 1]``."""
    neurons = rows.budget.neurons
    scores_TF = rows.scores_TF.float()
    mean_T1 = rows.sum(scores_TF.sum(dim=-1, keepdim=True)) / neurons
    squares_T1 = rows.sum((scores_TF - mean_T1).square().sum(dim=-1, keepdim=True))
    quantile = NormalDist().inv_cdf(1 - rows.budget.keep_ratio)
    # A NaN is passed on to the threshold, with which nothing compares.
    return mean_T1 + (squares_T1 / neurons).sqrt() * quantile


METHOD = Rule(
    name="statistical",
    formula="scores above mean + std PhiInv(1 - r)",
    source="arXiv 2506.06644; Gemma 3n",
    mask=statistical,
    score="signed_gate",
    fixed_count=False,
    exchange="sums",
)
