"""Whole experts on CPU: the bits of products, gated unit and sums one after the other."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mone_megatron.kernels import experts_cpu, ops
from mone_megatron.kernels.compiled_cpu import compiled, compiled_products
from mone_megatron.kernels.reference import TopK, WeightSums

needs_compiler = pytest.mark.skipif(compiled_products() is None, reason=compiled().problem)

TOKENS, HIDDEN, NEURONS, EXPERTS, KEPT = 50, 24, 40, 5, 11
CHOICES = {
    "plain": ops.Choice(),
    "selected": ops.Choice(KEPT),
    "normalized": ops.Choice(KEPT, sums=True, normalize=True),
    "raw": ops.Choice(KEPT, sums=True),
}
ROUTINGS = ("two_each", "uneven", "one_expert", "none")


@dataclass(frozen=True)
class Case:
    """What experts get, and the gradients of what they give."""

    tokens: Tensor
    probs: Tensor
    gate_up: Tensor
    down: Tensor
    rows: ops.Rows
    grad: Tensor
    grad_sums: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.tokens, self.probs, self.gate_up, self.down


def make(routing: str) -> Case:
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    scores = torch.rand(TOKENS, EXPERTS, generator=generator)
    if routing == "two_each":
        scores[:, 1] = -1.0  # an expert without rows
        chosen = torch.zeros(scores.shape, dtype=torch.bool)
        chosen.scatter_(1, scores.topk(2, dim=1).indices, True)
    elif routing == "uneven":
        chosen = scores > 0.6
    else:
        chosen = torch.zeros(scores.shape, dtype=torch.bool)
        chosen[:, 3] = routing == "one_expert"
    expert_T, token_T = chosen.T.nonzero().unbind(-1)
    rows = ops.Rows(chosen.sum(dim=0), token_T.contiguous(), token_T * EXPERTS + expert_T)
    return Case(
        random(TOKENS, HIDDEN).requires_grad_(),
        (torch.rand(chosen.shape, generator=generator) * chosen).requires_grad_(),
        (random(EXPERTS, 2, NEURONS, HIDDEN) / 4).requires_grad_(),
        random(EXPERTS, NEURONS, HIDDEN).requires_grad_(),
        rows,
        random(TOKENS, HIDDEN),
        random(EXPERTS, NEURONS),
    )


def one_after_the_other(case: Case, choice: ops.Choice) -> tuple[Tensor, ...]:
    rows = case.rows
    groups = ops.RowGroups.of(rows.counts_A)
    both = ops.expert_product(
        case.tokens.index_select(0, rows.token_T), case.gate_up, groups, outputs_first=True
    )
    gate, up = ops.halves(both)
    scale = case.probs.reshape(-1).index_select(0, rows.place_T)
    keep = TopK(choice.k, "abs_activation") if choice.k else None
    sums: tuple[Tensor, ...] = ()
    if choice.sums:
        segment = torch.arange(EXPERTS).repeat_interleave(rows.counts_A)
        wanted = WeightSums(segment, EXPERTS, normalize=choice.normalize, in_order=True)
        hidden, *sums = ops.selected_glu_and_sums(gate, up, keep, scale, wanted)
    else:
        hidden = ops.selected_glu(gate, up, keep, scale)
    made = ops.expert_product(hidden, case.down, groups)
    out = torch.zeros(case.tokens.shape).index_add(0, rows.token_T, made)
    return out, *sums


def gradients(case: Case, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    loss = (outputs[0] * case.grad).sum()
    if len(outputs) > 1:
        loss = loss + (outputs[1] * case.grad_sums).sum()
    return torch.autograd.grad(loss, case.leaves)


@needs_compiler
@pytest.mark.parametrize("block", [1, 30 * NEURONS, 10**6])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_experts_at_once_give_the_bits_of_one_step_after_the_other(
    routing: str, choice: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts_cpu, "_BLOCK_ELEMENTS", block)
    case, chosen = make(routing), CHOICES[choice]
    ours = ops.through_experts(*case.leaves, case.rows, chosen)
    assert ours is not None
    ours = tuple(one for one in ours if one is not None)
    theirs = one_after_the_other(case, chosen)
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)
    for mine, other in zip(gradients(case, ours), gradients(case, theirs), strict=True):
        # torch adds the gradients of a token's rows in another way.
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)


@needs_compiler
@pytest.mark.parametrize("routing", ROUTINGS)
def test_any_number_of_threads_gives_the_same(routing: str) -> None:
    made = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            case = make(routing)
            outputs = ops.through_experts(*case.leaves, case.rows, CHOICES["normalized"])
            assert outputs is not None
            given = tuple(one for one in outputs if one is not None)
            made.append([*given, *gradients(case, given)])
    finally:
        torch.set_num_threads(before)
    for others in made[1:]:
        for one, other in zip(made[0], others, strict=True):
            assert torch.equal(one, other)


@needs_compiler
def test_gradients_are_added_where_they_are_collected() -> None:
    case = make("two_each")
    expected = torch.autograd.grad(
        (ops.through_experts(*case.leaves, case.rows, ops.Choice())[0] * case.grad).sum(),
        case.leaves[2:],
    )
    for weight in case.leaves[2:]:
        weight.main_grad = torch.full_like(weight, 0.5).detach()
        weight.adds_to_main_grad = True
        weight.grad_added_to_main_grad = False
    out = ops.through_experts(*case.leaves, case.rows, ops.Choice())[0]
    (out * case.grad).sum().backward()
    for weight, grad in zip(case.leaves[2:], expected, strict=True):
        assert weight.grad is None
        assert weight.grad_added_to_main_grad
        torch.testing.assert_close(weight.main_grad, 0.5 + grad, rtol=1e-5, atol=1e-5)
        assert torch.equal(weight.main_grad[1], torch.full_like(grad[1], 0.5))  # has no rows


def test_nothing_does_it_at_once_without_a_compiler_or_in_other_precision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = make("two_each")
    halves = tuple(leaf.detach().bfloat16() for leaf in case.leaves)
    assert ops.through_experts(*halves, case.rows, ops.Choice()) is None
    monkeypatch.setattr(ops, "_chosen", "reference")
    assert ops.through_experts(*case.leaves, case.rows, ops.Choice()) is None
    monkeypatch.setattr(ops, "_chosen", "auto")
    monkeypatch.setattr(ops.compiled_cpu, "compiled_products", lambda: None)
    assert ops.through_experts(*case.leaves, case.rows, ops.Choice()) is None
