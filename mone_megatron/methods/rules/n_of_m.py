"""Keeps the n largest scores of every m adjacent neurons: structured sparsity (2:4, 8:16).

n is the keep ratio's share of m, so that every row keeps exactly the budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mone_megatron.methods.rule import Budget, Rows, Rule

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Options:
    """Holds the options."""

    m: int = 4
    """How many adjacent neurons make up a group."""


def check(budget: Budget) -> None:
    """Refuses groups that do not divide the expert, or of which the ratio keeps no whole number.

    Raises:
        ValueError: for such a budget; the message names the key.
    """
    m = budget.options.m
    if m < 1 or budget.neurons % m:
        raise ValueError(f"mone.rule_options.m: {m} does not divide {budget.neurons} neurons")
    kept = budget.keep_ratio * m
    if abs(kept - round(kept)) > 1e-6 or round(kept) < 1:
        raise ValueError(
            f"mone.keep_ratio: {budget.keep_ratio:g} of mone.rule_options.m={m} neurons is "
            f"{kept:g}; use a ratio that keeps whole neurons of each group, such as "
            f"{max(1, round(kept)) / m:g}"
        )


def n_of_m(rows: Rows) -> Tensor:
    """Returns the mask of the n largest scores of each group, ties to the lowest index."""
    m = rows.budget.options.m
    groups_TGM = rows.scores_TF.unflatten(-1, (-1, m))
    n = round(rows.budget.keep_ratio * m)
    best_TGN = groups_TGM.sort(dim=-1, descending=True, stable=True).indices[..., :n]
    mask_TGM = groups_TGM.new_zeros(groups_TGM.shape).bool().scatter(-1, best_TGN, True)
    # A row that holds a NaN keeps nothing.
    return mask_TGM.flatten(-2) & ~rows.scores_TF.isnan().any(dim=-1, keepdim=True)


def group(budget: Budget) -> int:
    """Returns m: a group's neurons are ranked among themselves, so one rank holds them."""
    m: int = budget.options.m
    return m


def most_kept(budget: Budget) -> int:
    """Returns K, which every row keeps."""
    return budget.kept


METHOD = Rule(
    name="n_of_m",
    formula="the n largest scores of every m adjacent neurons",
    source="arXiv 2509.22166",
    mask=n_of_m,
    options=Options,
    check=check,
    exchange="nothing",
    unit=group,
    most_kept=most_kept,
)
