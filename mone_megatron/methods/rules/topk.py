"""Keeps the K neurons with the largest scores, for each token: the rule of the paper."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mone_megatron.methods.rule import Budget, Rows, Rule

if TYPE_CHECKING:
    from torch import Tensor


def topk(rows: Rows) -> Tensor:
    """Returns the mask of the K largest scores of every row."""
    return rows.largest(rows.budget.kept)


def most_kept(budget: Budget) -> int:
    """Returns K, which every row keeps."""
    return budget.kept


METHOD = Rule(
    name="topk",
    formula="the K largest scores of a token",
    source="arXiv 2510.05781",
    mask=topk,
    exchange="largest",
    most_kept=most_kept,
    top_k=True,
)
