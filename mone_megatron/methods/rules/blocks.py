"""Keeps whole blocks of adjacent neurons, those with the largest sums of scores.

A kept block is a tile of each projection, which matrix units multiply without gathering.
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

    size: int = 16
    """How many adjacent neurons are a block."""


def check(budget: Budget) -> None:
    """Refuses blocks that do not divide the expert, or of which the ratio keeps no whole number.

    Raises:
        ValueError: for such a budget; the message names the key.
    """
    size = budget.options.size
    if size < 1 or budget.neurons % size:
        raise ValueError(f"mone.rule_options.size: {size} does not divide {budget.neurons} neurons")
    count = budget.neurons // size
    kept = budget.keep_ratio * count
    if abs(kept - round(kept)) > 1e-6 or round(kept) < 1:
        raise ValueError(
            f"mone.keep_ratio: {budget.keep_ratio:g} of {count} blocks of mone.rule_options.size="
            f"{size} neurons is {kept:g}; use a ratio that keeps whole blocks, such as "
            f"{max(1, round(kept)) / count:g}"
        )


def blocks(rows: Rows) -> Tensor:
    """Returns the mask of the blocks whose sums of scores are largest, ties to the lowest index."""
    size = rows.budget.options.size
    sums_TB = rows.scores_TF.unflatten(-1, (-1, size)).float().sum(dim=-1)
    return rows.largest_of(sums_TB, rows.budget.kept // size).repeat_interleave(size, dim=-1)


def block(budget: Budget) -> int:
    """Returns how many neurons one rank has to hold together."""
    size: int = budget.options.size
    return size


def most_kept(budget: Budget) -> int:
    """Returns K, which every row keeps."""
    return budget.kept


METHOD = Rule(
    name="blocks",
    formula="the blocks of neurons with the largest sums of scores",
    source="arXiv 2602.06183",
    mask=blocks,
    options=Options,
    check=check,
    exchange="largest",
    unit=block,
    most_kept=most_kept,
)
