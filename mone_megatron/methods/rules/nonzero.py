"""Keeps every neuron whose score is not zero: the sparsity that an activation makes by itself.

With ``model.activation=relu`` or ``drelu`` and ``mone.score=abs_product`` the kept neurons are
those whose product a u is not zero, so the layer computes what a plain one does, and its true
density is measured. The keep ratio is only what a loss may steer it to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mone_megatron.methods.rule import Rows, Rule

if TYPE_CHECKING:
    from torch import Tensor


def nonzero(rows: Rows) -> Tensor:
    """Returns True where a score is not zero, and nothing of a row that holds a NaN."""
    broken_T1 = rows.sum(rows.scores_TF.isnan().any(dim=-1, keepdim=True).float()) > 0
    return (rows.scores_TF != 0) & ~broken_T1


METHOD = Rule(
    name="nonzero",
    formula="scores that are not zero",
    source="arXiv 2406.05955, 2603.23198",
    mask=nonzero,
    score="abs_product",
    fixed_count=False,
    keeps_budget=False,
    keeps_nonzero=True,
    exchange="sums",
)
