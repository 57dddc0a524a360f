"""Keeps the scores above a calibrated threshold tau, in training and outside.

tau begins as the mean of the rows' K-th largest scores, and moves in proportion to how far the
density is from the keep ratio. Rows keep different numbers of neurons, and nothing is sorted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mone_megatron.methods.rule import Budget, Rows, Rule, Steerable

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Options:
    """Holds the options."""

    rate: float = 1.0
    """By how much of the mean size of a score a step moves tau when the density is off by 1."""


def check(budget: Budget) -> None:
    """Refuses a rate that moves nothing.

    Raises:
        ValueError: for such a budget; the message names the key.
    """
    if budget.options.rate <= 0:
        raise ValueError(
            f"mone.rule_options.rate: {budget.options.rate:g} is not above 0; use such as 1"
        )


def threshold(rows: Rows) -> Tensor:
    """Returns True where a score is above tau; the K largest of experts that have no tau yet."""
    return rows.above(rows.state["tau"], rows.state["seen"])


def observe(rows: Rows, mask_TF: Tensor) -> Mapping[str, Tensor]:
    """Returns sums over the rows of each expert: of kept neurons, smallest kept scores, sizes."""
    scores_TF = rows.scores_TF.float()
    told_T = mask_TF.any(dim=-1)
    smallest_T = scores_TF.masked_fill(~mask_TF, float("inf")).amin(dim=-1).where(told_T, 0)
    values_T = {
        "rows": smallest_T.new_ones(len(smallest_T)),
        "kept": mask_TF.sum(dim=-1).float(),
        "told": told_T.float(),
        "smallest": smallest_T,
        "size": scores_TF.abs().mean(dim=-1).nan_to_num(),
    }
    return rows.sum_by_expert(values_T)


def advance(
    state: Mapping[str, Tensor], sums: Mapping[str, Tensor], budget: Budget
) -> Mapping[str, Tensor]:
    """Raises tau where more than the keep ratio was kept, and lowers it otherwise."""
    rows_E = sums["rows"].clamp_min(1)
    density_E = sums["kept"] / (rows_E * budget.neurons)
    step_E = budget.options.rate * sums["size"] / rows_E * (density_E - budget.keep_ratio)
    first_E = sums["smallest"] / sums["told"].clamp_min(1)
    tau_E = (state["tau"] + step_E).where(state["seen"] > 0, first_E)
    seen_E = ((state["seen"] > 0) | (sums["told"] > 0)).float()
    return {"tau": tau_E.where(sums["rows"] > 0, state["tau"]), "seen": seen_E}


METHOD = Rule(
    name="threshold",
    formula="scores above tau, which steers the density to r",
    source="CATS; arXiv 2605.08575",
    mask=threshold,
    options=Options,
    check=check,
    fixed_count=False,
    state={"tau": 0.0, "seen": 0.0},
    observe=observe,
    advance=advance,
    steerable={
        "tau": Steerable(
            start=0.1,
            largest=float("inf"),
            raises=False,
            beside={"seen": 1.0},
            moved_by=("rate",),
        )
    },
)
