"""Ranks the neurons of all experts of a token together, by the router's weight times their scores.

A token that chose k experts keeps k K of their neurons, more in some experts than in others. With
one expert a token it keeps what the K largest are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mone_megatron.methods.grouped_rows import GroupedRows
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
    # A GPU that trains is not waited for; one that generates is asked for a few numbers rather than
    # given hundreds of small operations.
    ranking = all_at_once if rows.training and not rows.on_host else in_a_table
    return ranking(rows, rows.token_T, values_TF)


def in_a_table(rows: Rows, token_T: Tensor, values_TF: Tensor) -> Tensor:
    """Returns the mask by a table with a line for each token; a GPU is waited for once."""
    from torch import stack

    tokens = GroupedRows.of(token_T)
    number_T, count_T = tokens.number_T, tokens.count()
    place_T = tokens.before(count_T.new_ones(count_T.shape), rows.expert_T.argsort(stable=True))
    last, most = stack([number_T.max(), count_T.max()]).cpu().tolist()
    shape = (last + 1, most, values_TF.shape[-1])
    # Places of experts that a token did not choose rank last, beyond what it keeps.
    table_NPF = values_TF.new_full(shape, -float("inf"))
    table_NPF[number_T, place_T] = values_TF
    kept = rows.budget.kept
    budget_N = count_T.new_zeros(last + 1).scatter(0, number_T, count_T * kept)
    mask_NPF = largest(table_NPF.flatten(1), budget_N, most * kept).view(shape)
    return mask_NPF[number_T, place_T]


def largest(values_NV: Tensor, budget_N: Tensor, most: int) -> Tensor:
    """Returns the mask of the largest values of each row, as many as its budget says.

    Args:
        values_NV: the values.
        budget_N: from 1 to ``most``.
        most: the largest budget.
    """
    broken_N1 = values_NV.isnan().any(dim=-1, keepdim=True)
    sorted_NB = values_NV.topk(most, dim=-1).values
    last_N1 = sorted_NB.gather(-1, budget_N.unsqueeze(-1) - 1)
    above_NV = values_NV > last_N1
    tied_NV = values_NV == last_N1
    room_N1 = budget_N.unsqueeze(-1) - above_NV.sum(dim=-1, keepdim=True)
    return (above_NV | (tied_NV & (tied_NV.cumsum(dim=-1) <= room_N1))) & ~broken_N1


def all_at_once(rows: Rows, token_T: Tensor, values_TF: Tensor) -> Tensor:
    """Returns :func:`in_a_table` without asking a GPU how many experts a token has."""
    tokens = GroupedRows.of(token_T)
    broken_T = values_TF.isnan().any(dim=-1)
    ranked_TF = values_TF.masked_fill(broken_T.unsqueeze(-1), -float("inf"))
    by_expert_T = rows.expert_T.argsort(stable=True)
    kept_T = tokens.count() * rows.budget.kept
    whole_T = tokens.sum(broken_T.long()) == 0
    return tokens.largest(ranked_TF, kept_T, by_expert_T) & whole_T.unsqueeze(-1)


METHOD = Rule(
    name="pooled",
    formula="the k K largest p score of a token's k experts together",
    source="this project; arXiv 2510.05781 for one expert",
    mask=pooled,
    fixed_count=False,
    pools=True,
)
