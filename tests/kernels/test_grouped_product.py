"""Products of experts on CPU: those of torch's grouped_mm, and gradients added in place."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mone_megatron.kernels import ops

pytestmark = pytest.mark.usefixtures("cpu_functions")

INPUTS, OUTPUTS = 24, 40
COUNTS = [[5, 0, 3], [0, 0, 4], [7, 1, 0], [64, 33, 90]]


def make(counts: list[int], outputs_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (OUTPUTS, INPUTS) if outputs_first else (INPUTS, OUTPUTS)
    rows = torch.randn(sum(counts), INPUTS, generator=generator).requires_grad_()
    weight = torch.randn(len(counts), *shape, generator=generator).requires_grad_()
    return rows, weight, torch.randn(sum(counts), OUTPUTS, generator=generator)


def grouped_mm(rows: Tensor, weight: Tensor, counts: list[int], outputs_first: bool) -> Tensor:
    ends = torch.tensor(counts).cumsum(0).int()
    return F.grouped_mm(rows, weight.transpose(1, 2) if outputs_first else weight, offs=ends)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("outputs_first", [True, False])
def test_products_and_gradients_are_those_of_grouped_mm(
    counts: list[int], outputs_first: bool
) -> None:
    rows, weight, grad = make(counts, outputs_first)
    groups = ops.RowGroups.of(torch.tensor(counts))
    ours = ops.expert_product(rows, weight, groups, outputs_first=outputs_first)
    theirs = grouped_mm(rows, weight, counts, outputs_first)
    torch.testing.assert_close(ours, theirs)
    gradients = torch.autograd.grad(ours, (rows, weight), grad)
    expected = torch.autograd.grad(theirs, (rows, weight), grad)
    for mine, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("outputs_first", [True, False])
def test_gradients_are_added_where_they_are_collected(
    counts: list[int], outputs_first: bool
) -> None:
    rows, weight, grad = make(counts, outputs_first)
    groups = ops.RowGroups.of(torch.tensor(counts))
    ours = ops.expert_product(rows, weight, groups, outputs_first=outputs_first)
    expected = torch.autograd.grad(ours, weight, grad)[0]
    before = torch.full_like(weight, 0.5).detach()
    weight.main_grad = before.clone()
    weight.adds_to_main_grad = True
    weight.grad_added_to_main_grad = False
    ours = ops.expert_product(rows, weight, groups, outputs_first=outputs_first)
    ours.backward(grad)
    assert weight.grad is None
    assert weight.grad_added_to_main_grad
    # Each product is added to what there is before its sum is rounded.
    torch.testing.assert_close(weight.main_grad, before + expected, rtol=1e-6, atol=1e-5)
    for expert, count in enumerate(counts):
        assert count or torch.equal(weight.main_grad[expert], before[expert])


def test_halves_are_chunks_whose_gradients_are_not_copied() -> None:
    both = torch.randn(6, 10, requires_grad=True)
    first, second = ops.halves(both)
    for mine, other in zip((first, second), both.chunk(2, dim=-1), strict=True):
        assert torch.equal(mine, other)
    whole = torch.randn(6, 10)
    (grad,) = torch.autograd.grad((first, second), both, whole.chunk(2, dim=-1))
    assert grad.data_ptr() == whole.data_ptr()
    assert torch.equal(grad, whole)


@pytest.mark.parametrize("case", ["apart", "swapped", "first_alone", "second_alone"])
def test_gradients_of_halves_that_are_of_no_one_matrix(case: str) -> None:
    both = torch.randn(6, 10, requires_grad=True)
    whole = torch.randn(6, 10)
    one, other = whole.chunk(2, dim=-1)
    grads = {
        "apart": (one.clone(), other.clone()),
        "swapped": (other, one),
        "first_alone": (one, None),
        "second_alone": (None, other),
    }[case]
    pairs = [
        (half, grad) for half, grad in zip(ops.halves(both), grads, strict=True) if grad is not None
    ]
    halves, given = zip(*pairs, strict=True)
    (ours,) = torch.autograd.grad(halves, both, given)
    expected = torch.cat([torch.zeros(6, 5) if grad is None else grad for grad in grads], dim=-1)
    assert torch.equal(ours, expected)
