"""Rotates queries and keys by their positions (RoPE) on CPU: the same numbers in fewer passes.

megatron-core's own puts halves together in copies, forward and backward, and computes cosines and
sines anew in every layer and microbatch.

Shape suffixes: S sequence, B batch, N heads, D head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mone_megatron.kernels.compiled_cpu import address, compiled, threads

# The angles that came last, with their cosines and sines: they are the same in every layer.
_last: tuple[Tensor, Tensor, Tensor] | None = None


def supports(x: Tensor, angles: Tensor) -> bool:
    """Returns whether :func:`rotate` can: fp32 on a CPU, whole heads, angles that do not learn."""
    return (
        x.dtype is angles.dtype is torch.float32
        and not x.is_cuda
        and x.shape[-1] == angles.shape[-1]
        and not angles.requires_grad
    )


def rotate(x_SBND: Tensor, angles: Tensor) -> Tensor:
    """Returns the heads rotated: ``x cos + (-second half, first half) sin``, ``[S, B, N, D]``.

    Args:
        x_SBND: fp32 queries or keys.
        angles: fp32, of each position and value, broadcasting to ``x_SBND``; the same tensor
            always holds the same angles.
    """
    rotated: Tensor = _Rotation.apply(x_SBND, *cosines_and_sines(angles))
    return rotated


def cosines_and_sines(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Returns both of the angles, which came last in most cases."""
    global _last
    if _last is None or _last[0] is not angles:
        _last = angles, angles.cos(), angles.sin()
    return _last[1:]


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x_SBND: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        ctx.save_for_backward(cos, sin)
        sin_first, sin_second = sin.chunk(2, dim=-1)
        return _turned(x_SBND, cos, sin_first, sin_second, sign=1)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad_SBND: Tensor
    ) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors  # type: ignore[attr-defined]
        sin_first, sin_second = sin.chunk(2, dim=-1)
        # The transposed rotation turns the other way.
        return _turned(grad_SBND, cos, sin_second, sin_first, sign=-1), None, None


def _turned(x_SBND: Tensor, cos: Tensor, sin_a: Tensor, sin_b: Tensor, *, sign: int) -> Tensor:
    """Returns ``x cos``, less ``sign`` times the second half by ``sin_a`` in the first half, and
    with ``sign`` times the first half by ``sin_b`` in the second.
    """
    turned = torch.empty(x_SBND.shape)
    library = compiled().library
    if library is not None:
        x_SBND = x_SBND if x_SBND.stride(-1) == 1 else x_SBND.contiguous()
        # Angles are made from a position's by repetition, or given as many as there are values.
        strides = cos.expand(x_SBND.shape).stride()[:-1]
        library.rotate(
            *x_SBND.shape, address(x_SBND), *x_SBND.stride()[:-1], address(cos), address(sin_a),
            address(sin_b), *strides, sign, address(turned), threads(),
        )  # fmt: skip
        return turned
    torch.mul(x_SBND, cos, out=turned)
    first, second = x_SBND.chunk(2, dim=-1)
    into_first, into_second = turned.chunk(2, dim=-1)
    part = torch.mul(second, sin_a)
    into_first.add_(part, alpha=-sign)
    into_second.add_(torch.mul(first, sin_b, out=part), alpha=sign)
    return turned
