"""Computes RMSNorm on CPU in fp32 with half of the passes over memory that autograd's takes.

torch has no kernel for it on CPU: its parts are operations of their own, forward and backward, and
what each gives is saved. The output here is the same to the last bit; the gradients are in closed
form, equal up to rounding. Only the input and one number a row are saved.

Shape suffixes: R rows (all dimensions but the last, with a last one of 1).
"""

from __future__ import annotations

import torch
from torch import Tensor


def supports(x: Tensor, weight: Tensor) -> bool:
    """Returns whether :func:`rms_norm` can: fp32 on a CPU."""
    return x.dtype is weight.dtype is torch.float32 and not x.is_cuda


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Returns ``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension.

    Args:
        x: fp32 ``[..., n]``.
        weight: fp32 ``[n]``.
        eps: added to the mean square.
    """
    normed: Tensor = _RMSNorm.apply(x, weight, eps)
    return normed


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: Tensor, weight: Tensor, eps: float
    ) -> Tensor:
        normed = torch.empty(x.shape)
        torch.mul(x, x, out=normed)
        inverse_R = normed.mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
        torch.mul(x, inverse_R, out=normed).mul_(weight)
        # Where the squares overflow, the output is 0, as torch's is. The gradient is then made no
        # number, so that the step is refused and nothing goes on without its gradient.
        inverse_R = inverse_R * (inverse_R / inverse_R)
        ctx.save_for_backward(x, weight, inverse_R)
        return normed

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        # With n = x * inverse, the gradient of x is (g w - n mean(g w n)) * inverse.
        x, weight, inverse_R = ctx.saved_tensors  # type: ignore[attr-defined]
        normed, product = torch.empty(2, *x.shape)
        torch.mul(x, inverse_R, out=normed)
        torch.mul(grad, normed, out=product)
        width = len(weight)
        by_row = product.view(-1, width)
        grad_weight = by_row.sum(dim=0)
        mean_R = torch.mv(by_row, weight).div_(width).view(inverse_R.shape)
        grad_x = torch.mul(grad, weight, out=product)
        return grad_x.addcmul_(normed, mean_R, value=-1.0).mul_(inverse_R), grad_weight, None
