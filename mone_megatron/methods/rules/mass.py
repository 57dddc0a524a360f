"""Keeps the fewest neurons that hold a share p of the row's scores: top-p over neurons.

p is a state of each expert that steers the density to the keep ratio, or an option that stays.
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

    p: float = 0.0
    """The share of the scores to keep, 1 for all; 0 steers it to the keep ratio."""
    rate: float = 0.5
    """How far p moves in a step when the density is off by 1."""


def check(budget: Budget) -> None:
    """Refuses a share that is none, and a rate that moves nothing.

    Raises:
        ValueError: for such a budget; the message names the key.
    """
    p, rate = budget.options.p, budget.options.rate
    if not 0 <= p <= 1:
        raise ValueError(f"mone.rule_options.p: {p:g} is not in [0, 1]; 0 steers it")
    if rate <= 0:
        raise ValueError(f"mone.rule_options.rate: {rate:g} is not above 0; use such as 0.5")


def mass(rows: Rows) -> Tensor:
    """Returns, in descending order, the neurons before which the kept share is below p."""
    fixed: float = rows.budget.options.p
    if fixed >= 1:
        # Rounding must not decide whether all shares add up to 1.
        return ~rows.scores_TF.isnan().any(dim=-1, keepdim=True).expand_as(rows.scores_TF)
    if fixed > 0:
        return at_least(rows.scores_TF, rows.scores_TF.new_full((1, 1), fixed))
    p_T1 = rows.state["p"][rows.expert_T].unsqueeze(-1)
    new_T1 = rows.state["seen"][rows.expert_T].unsqueeze(-1) == 0
    return rows.largest_of_new(new_T1, at_least(rows.scores_TF, p_T1))


def at_least(scores_TF: Tensor, p_T1: Tensor) -> Tensor:
    """Returns the fewest neurons whose scores sum to a share p; negative scores weigh nothing."""
    weights_TF = scores_TF.float().clamp_min(0)
    sorted_TF, order_TF = weights_TF.sort(dim=-1, descending=True, stable=True)
    before_TF = sorted_TF.cumsum(dim=-1) - sorted_TF
    # A NaN makes the sum one, with which nothing compares.
    kept_TF = before_TF < p_T1 * weights_TF.sum(dim=-1, keepdim=True)
    return kept_TF.new_zeros(kept_TF.shape).scatter(-1, order_TF, kept_TF)


def observe(rows: Rows, mask_TF: Tensor) -> Mapping[str, Tensor]:
    """Returns sums over the rows of each expert: of kept neurons, and of the share they hold."""
    weights_TF = rows.scores_TF.float().clamp_min(0).nan_to_num()
    share_T = (weights_TF * mask_TF).sum(dim=-1) / weights_TF.sum(dim=-1).clamp_min(1e-30)
    values_T = {
        "rows": share_T.new_ones(len(share_T)),
        "kept": mask_TF.sum(dim=-1).float(),
        "share": share_T,
    }
    return rows.sum_by_expert(values_T)


def advance(
    state: Mapping[str, Tensor], sums: Mapping[str, Tensor], budget: Budget
) -> Mapping[str, Tensor]:
    """Lowers p where more than the keep ratio was kept, and raises it otherwise."""
    rows_E = sums["rows"].clamp_min(1)
    density_E = sums["kept"] / (rows_E * budget.neurons)
    moved_E = state["p"] + budget.options.rate * (budget.keep_ratio - density_E)
    p_E = moved_E.clamp(1e-3, 1).where(state["seen"] > 0, sums["share"] / rows_E)
    seen_E = ((state["seen"] > 0) | (sums["rows"] > 0)).float()
    return {"p": p_E.where(sums["rows"] > 0, state["p"]), "seen": seen_E}


METHOD = Rule(
    name="mass",
    formula="the largest scores that hold a share p of the row's, which steers the density to r",
    source="top-p sampling, over neurons",
    mask=mass,
    options=Options,
    check=check,
    fixed_count=False,
    state={"p": 1.0, "seen": 0.0},
    observe=observe,
    advance=advance,
    steerable={
        "p": Steerable(
            start=0.5,
            largest=1.0,
            raises=True,
            beside={"seen": 1.0},
            unless="p",
            moved_by=("rate",),
        )
    },
)
