"""Rankings over groups of rows in fixed shapes, against sorting, and against the rules' own loops.

A GPU computes rules by them; what a CPU keeps is the same in every bit.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mone_megatron.kernels.reference import topk_mask
from mone_megatron.methods.grouped_rows import GroupedRows
from mone_megatron.methods.rule import Rows
from mone_megatron.methods.rules import RULES, batch_topk, pooled
from mone_megatron.mone.selection import NeuronSelection, NeuronSelector

NEURONS = 24
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def _normal(values: Tensor) -> Tensor:
    return values


def _ties(values: Tensor) -> Tensor:
    return values.round()


def _zeros_of_both_signs(values: Tensor) -> Tensor:
    return torch.where(values.abs() < 1.5, values.sign() * 0.0, values)


def _infinite(values: Tensor) -> Tensor:
    return torch.where(values > 1, torch.inf, torch.where(values < -1, -torch.inf, values))


def _all_equal(values: Tensor) -> Tensor:
    return values * 0 - 3


KINDS = [_normal, _ties, _zeros_of_both_signs, _infinite, _all_equal]
# The group of each row: in order or not, with numbers left out, one each, one for all, no rows.
GROUPS = {
    "mixed": torch.tensor([7, 0, 7, 3, 3, 0, 7, 7, 90, 3, 7]),
    "in order": torch.tensor([2, 2, 2, 5, 5, 5, 5, 8]),
    "one each": torch.tensor([4, 1, 9, 0]),
    "one": torch.zeros(6, dtype=torch.int64),
    "none": torch.zeros(0, dtype=torch.int64),
}


def by_sorting(
    values_TF: Tensor, group_T: Tensor, kept: dict[int, int], order: list[int]
) -> Tensor:
    """True at the largest of each group; of equal values at those of the first rows in order."""
    mask_TF = torch.zeros(values_TF.shape, dtype=torch.bool)
    for group, count in kept.items():
        places = [
            (-float(values_TF[row, neuron]), order.index(row), neuron, row)
            for row in (group_T == group).nonzero().flatten().tolist()
            for neuron in range(values_TF.shape[-1])
        ]
        for _, _, neuron, row in sorted(places)[:count]:
            mask_TF[row, neuron] = True
    return mask_TF


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_T", GROUPS.values(), ids=GROUPS)
def test_the_largest_of_each_group_are_those_that_sorting_finds(
    kind: Callable[[Tensor], Tensor], dtype: torch.dtype, group_T: Tensor
) -> None:
    generator = torch.Generator().manual_seed(len(group_T))
    rows = len(group_T)
    values_TF = kind(torch.randn(rows, NEURONS, generator=generator) * 2).to(dtype)
    numbers = sorted(set(group_T.tolist()))
    # From one value of a group to all of them, and nothing.
    kept = {group: (index * 17) % (NEURONS + 1) for index, group in enumerate(numbers)}
    kept_T = torch.tensor([kept[group] for group in group_T.tolist()], dtype=torch.int64)
    order = torch.randperm(rows, generator=generator)
    groups = GroupedRows.of(group_T)
    assert groups.count().tolist() == [int((group_T == group).sum()) for group in group_T]
    for order_T, listed in ((None, list(range(rows))), (order, order.tolist())):
        expected = by_sorting(values_TF, group_T, kept, listed)
        assert torch.equal(groups.largest(values_TF, kept_T, order_T), expected)


def _rows(
    kind: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    rule: str,
    keep_ratio: float,
    neurons: int = NEURONS,
) -> Rows:
    generator = torch.Generator().manual_seed(5)
    rows = 60
    scores_TF = kind(torch.randn(rows, neurons, generator=generator) * 2).to(dtype)
    scores_TF[7, 3] = scores_TF[20, 0] = torch.nan
    return Rows(
        scores_TF=scores_TF,
        budget=RULES[rule].budget(keep_ratio, neurons),
        largest_of=topk_mask,
        expert_T=torch.arange(rows) % 4,
        num_experts=4,
        training=True,
        blocks=torch.randint(0, 6, (rows,), generator=generator) * 4 + torch.arange(rows) % 4,
        token_T=torch.randint(0, 25, (rows,), generator=generator),
        weight_T=torch.rand(rows, generator=generator).round(decimals=1),
    )


# Of 24 neurons 0.3 and 0.0625 keep halves: 7.2 and 1.5 of a row.
@pytest.mark.parametrize("keep_ratio", [0.0625, 0.25, 0.3, 1.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rule_keeps_the_same_with_and_without_asking(
    kind: Callable[[Tensor], Tensor], dtype: torch.dtype, keep_ratio: float
) -> None:
    rows = _rows(kind, dtype, "batch_topk", keep_ratio)
    ranked_TF = rows.scores_TF.nan_to_num(-torch.inf, torch.inf, -torch.inf)
    expected = batch_topk.one_by_one(rows, ranked_TF)
    assert expected.any()
    assert torch.equal(batch_topk.all_at_once(rows, ranked_TF), expected)

    rows = _rows(kind, dtype, "pooled", keep_ratio)
    assert rows.token_T is not None
    assert rows.weight_T is not None
    values_TF = rows.scores_TF.double() * rows.weight_T.double().unsqueeze(-1)
    expected = pooled.in_a_table(rows, rows.token_T, values_TF)
    assert expected.any()
    assert torch.equal(pooled.all_at_once(rows, rows.token_T, values_TF), expected)


@pytest.mark.parametrize("rule", RULES.names)
def test_each_rule_in_training_keeps_on_a_gpu_what_a_cpu_keeps(
    rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what its state becomes; a GPU takes the other form of each rule that has two."""
    rows = _rows(_ties, torch.float32, rule, 0.25, neurons=64)
    assert rows.blocks is not None
    given = {"block_T": rows.blocks, "token_T": rows.token_T, "weight_T": rows.weight_T}
    found = []
    for on_host in (True, False):
        monkeypatch.setattr(Rows, "on_host", on_host)
        selector = NeuronSelector(
            NeuronSelection(0.25, "signed_gate", rule), 64, num_local_experts=4, num_experts=4
        ).train()
        masks = []
        for step in range(2):
            gate_TF = rows.scores_TF.roll(step, 0)
            masks.append(selector(gate_TF, gate_TF, rows.expert_T, observing=True, **given))
            selector.advance(applied=True)
        found.append((torch.stack(masks), selector.state))
    (expected, expected_state), (kept, state) = found
    assert expected.any()
    assert torch.equal(kept, expected)
    assert all(torch.equal(state[name], value) for name, value in expected_state.items())


def test_sums_and_the_least_of_groups_stand_at_their_rows() -> None:
    group_T, value_T = GROUPS["mixed"], torch.arange(11)
    groups = GroupedRows.of(group_T)
    for row in range(11):
        mine = group_T == group_T[row]
        assert groups.sum(value_T)[row] == value_T[mine].sum()
        assert groups.least(value_T.float())[row] == value_T[mine].min()
        assert groups.before(value_T)[row] == value_T[:row][mine[:row]].sum()
    assert groups.number_T.tolist() == [2, 0, 2, 1, 1, 0, 2, 2, 3, 1, 2]
