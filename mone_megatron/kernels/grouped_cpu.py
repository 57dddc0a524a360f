"""Multiplies the rows of each expert by its matrix, on CPU in fp32, one product an expert.

Forward and input gradients are those of ``torch.nn.functional.grouped_mm``, bit for bit, without
its bookkeeping. The gradient of the weights can go straight to where gradients are added up
(megatron-core's ``main_grad``): the product of an expert is added to it while it is made, which
equals a sum afterwards up to rounding, and experts without rows are passed over, where autograd
makes, fills and adds a gradient of all experts in every microbatch. Views of all experts are made
in one call.

Shape suffixes: T rows, E experts, I values of a row, O values of its product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def grouped_product(
    rows_TI: Tensor, weight: Tensor, counts: Sequence[int], *, outputs_first: bool
) -> Tensor:
    """Returns each expert's rows times its matrix, ``[T, O]``.

    Args:
        rows_TI: fp32, expert after expert.
        weight: fp32 and contiguous, ``[E, ...]``; an expert's values are ``[I, O]`` in their order,
            or ``[O, I]`` with ``outputs_first``. If it has ``main_grad`` and ``adds_to_main_grad``
            is set on it, its gradient is added there, and autograd is told that there is none.
        counts: the rows of each expert.
        outputs_first: see ``weight``.
    """
    product_TO: Tensor = _GroupedProduct.apply(rows_TI, weight, counts, outputs_first)
    return product_TO


def _matrices(tensor: Tensor, inputs: int, outputs_first: bool) -> Tensor:
    """Returns the experts' matrices ``[E, I, O]``, as a view."""
    if outputs_first:
        return tensor.view(len(tensor), -1, inputs).transpose(1, 2)
    return tensor.view(len(tensor), inputs, -1)


class _GroupedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        rows_TI: Tensor,
        weight: Tensor,
        counts: Sequence[int],
        outputs_first: bool,
    ) -> Tensor:
        matrix_EIO = _matrices(weight, rows_TI.shape[1], outputs_first)
        product_TO = rows_TI.new_empty(len(rows_TI), matrix_EIO.shape[2])
        _multiply(rows_TI, matrix_EIO, counts, product_TO)
        ctx.save_for_backward(rows_TI, weight)
        ctx.counts = counts  # type: ignore[attr-defined]
        ctx.outputs_first = outputs_first  # type: ignore[attr-defined]
        return product_TO

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad_TO: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        rows_TI, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        counts: Sequence[int] = ctx.counts  # type: ignore[attr-defined]
        outputs_first: bool = ctx.outputs_first  # type: ignore[attr-defined]
        inputs = rows_TI.shape[1]
        grad_rows_TI = None
        if ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
            matrix_EOI = _matrices(weight, inputs, outputs_first).transpose(1, 2)
            grad_rows_TI = torch.empty_like(rows_TI)
            _multiply(grad_TO, matrix_EOI, counts, grad_rows_TI)
        grad_weight = None
        if ctx.needs_input_grad[1]:  # type: ignore[attr-defined]
            # A gradient has the order of the weight's values.
            from_T, into_T = (grad_TO, rows_TI) if outputs_first else (rows_TI, grad_TO)
            sizes = len(counts), from_T.shape[1], into_T.shape[1]
            if getattr(weight, "adds_to_main_grad", False):
                _add_products(from_T, into_T, counts, weight.main_grad.view(sizes))
                # megatron-core's hook adds what autograd has made, unless this says that it is
                # there.
                weight.grad_added_to_main_grad = True
            else:
                grad_weight = torch.empty_like(weight)
                _write_products(from_T, into_T, counts, grad_weight.view(sizes))
        return grad_rows_TI, grad_weight, None, None


def _multiply(rows_TI: Tensor, matrix_EIO: Tensor, counts: Sequence[int], out_TO: Tensor) -> None:
    """Writes each expert's rows times its matrix."""
    parts = rows_TI.split_with_sizes(counts), matrix_EIO.unbind(), out_TO.split_with_sizes(counts)
    for count, rows, matrix, out in zip(counts, *parts, strict=True):
        if count:
            torch.mm(rows, matrix, out=out)


def _add_products(from_T: Tensor, into_T: Tensor, counts: Sequence[int], total_E: Tensor) -> None:
    """Adds each expert's gradient to its total; those of experts without rows stay as they are."""
    parts = from_T.split_with_sizes(counts), into_T.split_with_sizes(counts), total_E.unbind()
    for count, rows, others, total in zip(counts, *parts, strict=True):
        if count:
            total.addmm_(rows.t(), others)


def _write_products(from_T: Tensor, into_T: Tensor, counts: Sequence[int], total_E: Tensor) -> None:
    """Writes each expert's gradient: zeros for experts without rows."""
    parts = from_T.split_with_sizes(counts), into_T.split_with_sizes(counts), total_E.unbind()
    for rows, others, total in zip(*parts, strict=True):
        # The product of no rows is written, too.
        torch.mm(rows.t(), others, out=total)
