"""Norms and rotations on CPU in few passes: as torch and megatron-core compute them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mone_megatron.kernels import rms_norm_cpu, rotary_cpu

pytestmark = pytest.mark.usefixtures("cpu_functions")

SHAPES = [(6, 2, 8), (6, 2, 3, 4), (0, 2, 8), (1, 1, 1)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _closeness(cpu_functions: str) -> dict[str, float]:
    """Operations of torch give torch's output to the last bit; compiled sums have another order."""
    return {"torch": {"rtol": 0.0, "atol": 0.0}, "compiled": {"rtol": 1e-6, "atol": 0.0}}[
        cpu_functions
    ]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_norm_is_torchs(shape: tuple[int, ...], cpu_functions: str) -> None:
    x = random(*shape).requires_grad_()
    weight = random(shape[-1], seed=1).requires_grad_()
    grad = random(*shape, seed=2)
    ours = rms_norm_cpu.rms_norm(x, weight, 1e-5)
    theirs = F.rms_norm(x, (shape[-1],), weight, 1e-5)
    torch.testing.assert_close(ours, theirs, **_closeness(cpu_functions))
    expected = torch.autograd.grad(theirs, (x, weight), grad)
    for mine, other in zip(torch.autograd.grad(ours, (x, weight), grad), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-6, atol=2e-6)


def test_a_norm_of_a_slice_and_of_large_and_tiny_values(cpu_functions: str) -> None:
    whole = random(5, 2, 12)
    whole[0] *= 1e15
    whole[1] *= 1e-25
    weight = random(4, seed=1).requires_grad_()
    ours, theirs = whole.clone().requires_grad_(), whole.clone().requires_grad_()
    one = rms_norm_cpu.rms_norm(ours[..., 4:8], weight, 1e-6)
    other = F.rms_norm(theirs[..., 4:8], (4,), weight, 1e-6)
    torch.testing.assert_close(one, other, **_closeness(cpu_functions))
    grad = random(5, 2, 4, seed=2)
    mine = torch.autograd.grad(one, (ours, weight), grad)
    expected = torch.autograd.grad(other, (theirs, weight), grad)
    torch.testing.assert_close(mine[0], expected[0], rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(mine[1], expected[1], rtol=1e-5, atol=1e-6)


def test_squares_that_overflow_leave_gradients_that_are_no_numbers() -> None:
    x = torch.tensor([[1.0, 2.0], [1e30, 1e30]], requires_grad=True)
    normed = rms_norm_cpu.rms_norm(x, torch.ones(2), 1e-5)
    torch.testing.assert_close(normed, F.rms_norm(x, (2,), torch.ones(2), 1e-5), rtol=1e-6, atol=0)
    (of_x,) = torch.autograd.grad(normed.sum(), (x,))
    assert of_x[0].isfinite().all()
    assert of_x[1].isnan().all()


def test_gradients_of_a_norm_by_finite_differences() -> None:
    x, weight = random(3, 5).double(), random(5, seed=1).double()
    grad = random(3, 5, seed=2).double()

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return (F.rms_norm(x, (5,), weight, 1e-5) * grad).sum()

    x32, weight32 = x.float().requires_grad_(), weight.float().requires_grad_()
    ours = rms_norm_cpu.rms_norm(x32, weight32, 1e-5)
    mine = torch.autograd.grad(ours, (x32, weight32), grad.float())
    for place, (value, gradient) in enumerate(zip((x, weight), mine, strict=True)):
        for index in range(value.numel()):
            step = torch.zeros(value.numel(), dtype=torch.float64)
            step[index] = 1e-6
            moved = [[x, weight], [x, weight]]
            moved[0][place] = value + step.view_as(value)
            moved[1][place] = value - step.view_as(value)
            slope = (loss(*moved[0]) - loss(*moved[1])) / 2e-6
            assert gradient.flatten()[index].item() == pytest.approx(slope.item(), abs=2e-5)


def test_what_is_not_fp32_is_left_to_torch() -> None:
    x, weight = random(2, 4), random(4)
    assert rms_norm_cpu.supports(x, weight)
    assert not rms_norm_cpu.supports(x.bfloat16(), weight.bfloat16())
    assert not rms_norm_cpu.supports(x.double(), weight.double())
    assert rotary_cpu.supports(x, weight)
    assert not rotary_cpu.supports(x.bfloat16(), weight)
    assert not rotary_cpu.supports(x, weight[:2])


def _rotated_by_hand(x: Tensor, angles: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()


@pytest.mark.parametrize("heads", [1, 2, 6])
def test_rotations_are_the_formula_to_the_last_bit(heads: int) -> None:
    for seed in (0, 1):  # other angles each time
        angles = random(7, 1, 1, 8, seed=seed)
        whole = random(7, 3, heads, 10, seed=2).requires_grad_()
        grad = random(7, 3, heads, 8, seed=3)
        ours = rotary_cpu.rotate(whole[..., 1:9], angles)
        theirs = _rotated_by_hand(whole[..., 1:9], angles)
        assert torch.equal(ours, theirs)
        (mine,), (expected,) = (torch.autograd.grad(y, whole, grad) for y in (ours, theirs))
        assert torch.equal(mine, expected)
