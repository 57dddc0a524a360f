"""Computes RMSNorm on CPU in fp32 with half of the passes over memory that autograd's takes.

torch has no kernel for it on CPU: its parts are operations of their own, forward and backward, and
what each gives is saved. Here the gradients are in closed form, and only the input and one number a
row are saved. Compiled (:mod:`.compiled_cpu`), each direction is one pass, equal to torch up to
rounding; where there is no compiler, operations of torch give its output to the last bit.

Shape suffixes: R rows (all dimensions but the last, with a last one of 1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mone_megatron.kernels.compiled_cpu import address, compiled, threads

# RUN in compiled_cpu.c.
_ROWS_OF_A_PART = 64


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
    library = compiled().library
    normed: Tensor
    if library is None:
        normed = _RMSNorm.apply(x, weight, eps)
    else:
        normed = _CompiledRMSNorm.apply(library, x, weight, eps)
    return normed


class _Rows:
    """Says where the rows of a tensor begin: ``inner`` of them apart by one stride, then a jump."""

    def __init__(self, x: Tensor) -> None:
        """Copies ``x`` only where its rows lie in another way."""
        levels: list[tuple[int, int]] = []  # sizes and strides, the innermost last
        for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
            if size == 1:
                continue
            if levels and levels[-1][1] == size * stride:  # goes on where the one before does
                levels[-1] = levels[-1][0] * size, stride
            else:
                levels.append((size, stride))
        if len(levels) > 2 or (x.stride(-1) != 1 and x.shape[-1] > 1):
            x = x.contiguous()
            levels = [(x.shape[:-1].numel(), x.shape[-1])]
        self.x = x
        self.inner, self.inner_stride = levels[-1] if levels else (1, 0)
        self.outer_stride = levels[0][1] if len(levels) == 2 else 0


class _CompiledRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        library: Any,
        x: Tensor,
        weight: Tensor,
        eps: float,
    ) -> Tensor:
        rows = _Rows(x)
        normed = torch.empty(x.shape)
        width = x.shape[-1]
        inverse_R = torch.empty(x.numel() // width)
        library.rms_norm_forward(
            len(inverse_R), width, rows.inner, rows.inner_stride, rows.outer_stride,
            address(rows.x), address(weight), eps, address(normed), address(inverse_R), threads(),
        )  # fmt: skip
        ctx.save_for_backward(rows.x, weight, inverse_R)
        ctx.library = library  # type: ignore[attr-defined]
        return normed

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[None, Tensor, Tensor, None]:
        x, weight, inverse_R = ctx.saved_tensors  # type: ignore[attr-defined]
        rows, of_grad = _Rows(x), _Rows(grad)
        if of_grad.inner != rows.inner:
            rows, of_grad = _Rows(rows.x.contiguous()), _Rows(of_grad.x.contiguous())
        width = x.shape[-1]
        grad_x, grad_weight = torch.empty(grad.shape), torch.empty(width)
        parts = torch.empty(-(-len(inverse_R) // _ROWS_OF_A_PART), width)
        ctx.library.rms_norm_backward(  # type: ignore[attr-defined]
            len(inverse_R), width, rows.inner, rows.inner_stride, rows.outer_stride,
            address(rows.x), address(weight), address(inverse_R), address(of_grad.x),
            of_grad.inner_stride, of_grad.outer_stride, address(grad_x), address(parts),
            address(grad_weight), threads(),
        )  # fmt: skip
        return None, grad_x, grad_weight, None


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
