"""Keeps the largest scores of all rows that an expert gets of a microbatch: batch top-k.

Some rows keep more neurons than others. Outside training a row must not look at others, so there a
threshold takes the place of the ranking: the running mean of the smallest score that was kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mone_megatron.methods.grouped_rows import GroupedRows
from mone_megatron.methods.rule import Budget, Rows, Rule, count_kept

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Options:
    """Holds the options."""

    decay: float = 0.9
    """The decay of the threshold's running mean, for each step."""


def check(budget: Budget) -> None:
    """Refuses a decay that is none.

    Raises:
        ValueError: for such a budget; the message names the key.
    """
    decay = budget.options.decay
    if not 0 <= decay < 1:
        raise ValueError(f"mone.rule_options.decay: {decay:g} is not in [0, 1); use such as 0.9")


def batch_topk(rows: Rows) -> Tensor:
    """Returns the r T f largest scores of each block in training, and those above tau otherwise."""
    if not rows.training:
        return rows.above(rows.state["tau"], rows.state["weight"])
    broken_T1 = rows.scores_TF.isnan().any(dim=-1, keepdim=True)
    ranked_TF = rows.scores_TF.masked_fill(broken_T1, -float("inf"))
    ranking = one_by_one if rows.on_host else all_at_once
    # A row that holds a NaN keeps nothing.
    return ranking(rows, ranked_TF) & ~broken_T1


def one_by_one(rows: Rows, ranked_TF: Tensor) -> Tensor:
    """Returns the mask of the largest values of each block, a block after the other."""
    mask_TF = rows.scores_TF.new_zeros(rows.scores_TF.shape).bool()
    for block in rows.block_T.unique():
        of_block_R = (rows.block_T == block).nonzero().squeeze(-1)
        flat_1N = ranked_TF[of_block_R].reshape(1, -1)
        kept = count_kept(rows.budget.keep_ratio, flat_1N.numel())
        mask_TF[of_block_R] = rows.largest_of(flat_1N, kept).view(len(of_block_R), -1)
    return mask_TF


def all_at_once(rows: Rows, ranked_TF: Tensor) -> Tensor:
    """Returns :func:`one_by_one` without asking a GPU which blocks there are."""
    blocks = GroupedRows.of(rows.block_T)
    # As count_kept does: of a half to the even number.
    values_T = (blocks.count() * ranked_TF.shape[-1]).double()
    kept_T = (values_T * rows.budget.keep_ratio).round().long()
    return blocks.largest(ranked_TF, kept_T)


def observe(rows: Rows, mask_TF: Tensor) -> Mapping[str, Tensor]:
    """Returns the smallest kept score of each row's block, added up by expert, and the rows."""
    zeros_E = rows.state["tau"].new_zeros(rows.num_experts)
    if len(mask_TF) == 0:
        return {"smallest": zeros_E, "rows": zeros_E}
    smallest_T = rows.scores_TF.float().masked_fill(~mask_TF, float("inf")).amin(dim=-1)
    # A block that keeps nothing, a NaN in each row, says nothing.
    of_block_T = GroupedRows.of(rows.block_T).least(smallest_T)
    told_T = of_block_T.isfinite()
    return {
        "smallest": zeros_E.index_add(0, rows.expert_T, of_block_T.where(told_T, 0)),
        "rows": zeros_E.index_add(0, rows.expert_T, told_T.float()),
    }


def advance(
    state: Mapping[str, Tensor], sums: Mapping[str, Tensor], budget: Budget
) -> Mapping[str, Tensor]:
    """Moves tau towards the mean of the smallest kept scores, each step weighing by its rows."""
    decay = budget.options.decay
    before_E = decay * state["weight"]
    weight_E = before_E + (1 - decay) * sums["rows"]
    tau_E = (before_E * state["tau"] + (1 - decay) * sums["smallest"]) / weight_E.clamp_min(1e-30)
    return {"tau": tau_E.where(weight_E > 0, state["tau"]), "weight": weight_E}


METHOD = Rule(
    name="batch_topk",
    formula="the r T f largest scores of an expert's T tokens; outside training scores above tau",
    source="arXiv 2412.06410, 2603.11535",
    mask=batch_topk,
    options=Options,
    check=check,
    fixed_count=False,
    reads_batch=True,
    state={"tau": 0.0, "weight": 0.0},
    observe=observe,
    advance=advance,
)
