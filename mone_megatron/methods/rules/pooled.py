"""Ranks the neurons of all experts of a token together, by the router's weight times their scores.

A token that chose k experts keeps k K of their neurons, more in some experts than in others. With
one expert a token it keeps what the K largest are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mone_megatron.methods.rule import Rows, Rule

if TYPE_CHECKING:
    from torch import Tensor


def pooled(rows: Rows) -> Tensor:
    """Returns the mask of each token's k K largest values of p times score, over its k rows.

    Ties go to the expert of lowest number, then to the neuron of lowest index. A token of which a
    row holds a NaN keeps nothing.
    """
    if rows.token_T is None or len(rows.scores_TF) == 0:
        return rows.largest(rows.budget.kept)
    # Products of the dtypes that there are, which fp64 holds exactly: with one expert a token
    # nothing may tie that did not.
    values_TF = rows.scores_TF.double()
    if rows.weight_T is not None:
        values_TF = values_TF * rows.weight_T.double().unsqueeze(-1)
    # Rows by token, and of one token by expert.
    order_T = rows.expert_T.argsort(stable=True)
    order_T = order_T[rows.token_T[order_T].argsort(stable=True)]
    token_T = rows.token_T[order_T]
    count_N = token_T.bincount()
    first_N = count_N.cumsum(0) - count_N
    place_T = token_T.new_ones(len(token_T)).cumsum(0) - 1 - first_N[token_T]
    most = int(count_N.max())
    shape = (len(count_N), most, values_TF.shape[-1])
    # Places of experts that a token did not choose rank last, beyond what it keeps.
    table_NPF = values_TF.new_full(shape, -float("inf"))
    table_NPF[token_T, place_T] = values_TF[order_T]
    kept_NPF = largest(table_NPF.flatten(1), count_N * rows.budget.kept).view(shape)
    mask_TF = kept_NPF.new_zeros(values_TF.shape)
    mask_TF[order_T] = kept_NPF[token_T, place_T]
    return mask_TF


def largest(values_NV: Tensor, budget_N: Tensor) -> Tensor:
    """Returns the mask of the largest values of each row, as many as its budget says."""
    broken_N1 = values_NV.isnan().any(dim=-1, keepdim=True)
    sorted_NB = values_NV.topk(int(budget_N.max()), dim=-1).values
    # Tokens that do not exist have a budget of none.
    last_N1 = sorted_NB.gather(-1, (budget_N - 1).clamp_min(0).unsqueeze(-1))
    above_NV = values_NV > last_N1
    tied_NV = values_NV == last_N1
    room_N1 = budget_N.unsqueeze(-1) - above_NV.sum(dim=-1, keepdim=True)
    return (above_NV | (tied_NV & (tied_NV.cumsum(dim=-1) <= room_N1))) & ~broken_N1


METHOD = Rule(
    name="pooled",
    formula="the k K largest p score of a token's k experts together",
    source="this project; arXiv 2510.05781 for one expert",
    mask=pooled,
    fixed_count=False,
    pools=True,
)
