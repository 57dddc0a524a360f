from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mone_megatron.kernels import ops, reference


def _inputs(seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    gate, up = torch.randn(2, 13, 20, generator=generator, dtype=dtype)
    mask = torch.rand(13, 20, generator=generator) < 0.4
    scale = torch.rand(13, generator=generator, dtype=dtype)
    return gate, up, mask, scale


def _leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.clone().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize("with_scale", [True, False])
def test_ops_equal_the_reference_forward_and_backward(with_mask: bool, with_scale: bool) -> None:
    gate, up, mask_TF, scale_T = _inputs(0)
    mask = mask_TF if with_mask else None
    grad = torch.randn(13, 20, generator=torch.Generator().manual_seed(9))
    results = []
    for implementation in (ops.selected_glu, reference.selected_glu):
        leaves = _leaves(gate, up, scale_T)
        output = implementation(leaves[0], leaves[1], mask, leaves[2] if with_scale else None)
        inputs = leaves if with_scale else leaves[:2]
        results.append((output.detach(), *torch.autograd.grad(output, inputs, grad)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    assert len(results[0]) == (4 if with_scale else 3)


def test_gradients_reach_the_kept_entries_only() -> None:
    gate, up, mask, scale_T = _inputs(1)
    leaves = _leaves(gate, up)
    output = ops.selected_glu(leaves[0], leaves[1], mask, scale_T)
    assert torch.equal(output != 0, mask)
    for gradient in torch.autograd.grad(output, leaves, torch.ones(13, 20)):
        assert torch.equal(gradient != 0, mask)


def test_backward_leaves_its_inputs_alone_and_can_run_twice() -> None:
    gate, up, mask, scale = _inputs(2)
    leaves = _leaves(gate, up, scale)
    output = ops.selected_glu(leaves[0], leaves[1], mask, leaves[2])
    grad = torch.ones(13, 20)
    first = torch.autograd.grad(output, leaves, grad, retain_graph=True)
    second = torch.autograd.grad(output, leaves, grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert grad.eq(1).all()
    for leaf, original in zip(leaves, (gate, up, scale), strict=True):
        assert torch.equal(leaf, original)


def test_reference_gradients_match_finite_differences_in_fp64() -> None:
    gate, up, mask, scale = _inputs(3, torch.float64)
    leaves = _leaves(gate[:4], up[:4], scale[:4])

    def masked(gate: Tensor, up: Tensor, scale: Tensor) -> Tensor:
        return reference.selected_glu(gate, up, mask[:4], scale)

    assert torch.autograd.gradcheck(masked, leaves)
    assert torch.autograd.gradcheck(
        lambda gate, up: reference.selected_glu(gate, up, None, None), leaves[:2]
    )


def test_fp32_gradients_match_finite_differences_of_the_reference() -> None:
    gate, up, mask, scale = _inputs(4)
    leaves = _leaves(gate, up, scale)
    grad = torch.randn(13, 20, generator=torch.Generator().manual_seed(5))
    output = ops.selected_glu(leaves[0], leaves[1], mask, leaves[2])
    gradients = torch.autograd.grad(output, leaves, grad)
    doubles = [tensor.double() for tensor in (gate, up, scale)]
    epsilon = 1e-6

    def objective(inputs: list[Tensor]) -> Tensor:
        output = reference.selected_glu(inputs[0], inputs[1], mask, inputs[2])
        return (output * grad.double()).sum()

    for which, index in ((0, (2, 3)), (0, (5, 0)), (1, (2, 3)), (1, (12, 19)), (2, (7,))):
        shifted = []
        for sign in (1, -1):
            moved = [tensor.clone() for tensor in doubles]
            moved[which][index] += sign * epsilon
            shifted.append(objective(moved))
        slope = (shifted[0] - shifted[1]) / (2 * epsilon)
        torch.testing.assert_close(gradients[which][index].double(), slope, rtol=1e-5, atol=1e-6)


def test_bf16_keeps_its_dtype_and_the_scale_in_fp32() -> None:
    gate, up, mask, _ = _inputs(6, torch.bfloat16)
    scale = torch.rand(13, generator=torch.Generator().manual_seed(6))
    output = ops.selected_glu(gate, up, mask, scale)
    assert output.dtype is torch.bfloat16
    exact = reference.selected_glu(gate.float(), up.float(), mask, scale)
    torch.testing.assert_close(output.float(), exact, rtol=2e-2, atol=1e-3)
    assert torch.equal(output, reference.selected_glu(gate, up, mask, scale))


def test_no_rows() -> None:
    gate = torch.zeros(0, 8, requires_grad=True)
    output = ops.selected_glu(
        gate, torch.zeros(0, 8), torch.zeros(0, 8, dtype=torch.bool), torch.zeros(0)
    )
    assert output.shape == (0, 8)
    (gradient,) = torch.autograd.grad(output, [gate], torch.zeros(0, 8))
    assert gradient.shape == (0, 8)
