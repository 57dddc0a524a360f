"""Multiplies the rows of each expert by its matrix, on CPU in fp32, one product an expert.

Forward and input gradients are those of ``torch.nn.functional.grouped_mm``, bit for bit, without
its bookkeeping. The gradient of the weights can go straight to where gradients are added up
(megatron-core's ``main_grad``): each expert's product is added while it is in the cache, and
experts without rows are passed over, where autograd makes, fills and adds a gradient of all
experts in every microbatch.

Shape suffixes: T rows, E experts, I values of a row, O values of its product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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


def _groups(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Yields each expert that has rows, and where they are."""
    first = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(first, first + count)
            first += count


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
        for expert, rows in _groups(counts):
            torch.mm(rows_TI[rows], matrix_EIO[expert], out=product_TO[rows])
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
            matrix_EIO = _matrices(weight, inputs, outputs_first)
            grad_rows_TI = torch.empty_like(rows_TI)
            for expert, rows in _groups(counts):
                torch.mm(grad_TO[rows], matrix_EIO[expert].T, out=grad_rows_TI[rows])
        grad_weight = None
        if ctx.needs_input_grad[1]:  # type: ignore[attr-defined]
            if getattr(weight, "adds_to_main_grad", False):
                _add_products(weight, rows_TI, grad_TO, counts, outputs_first)
            else:
                grad_weight = _products(weight, rows_TI, grad_TO, counts, outputs_first)
        return grad_rows_TI, grad_weight, None, None


def _product(
    rows_TI: Tensor, grad_TO: Tensor, rows: slice, outputs_first: bool, out: Tensor
) -> Tensor:
    """Writes the gradient of one expert's matrix into ``out``, in the order of its values."""
    if outputs_first:
        return torch.mm(grad_TO[rows].T, rows_TI[rows], out=out)
    return torch.mm(rows_TI[rows].T, grad_TO[rows], out=out)


def _products(
    weight: Tensor,
    rows_TI: Tensor,
    grad_TO: Tensor,
    counts: Sequence[int],
    outputs_first: bool,
) -> Tensor:
    grad_weight = torch.empty_like(weight)
    by_expert = grad_weight.view(len(counts), *_order(rows_TI, grad_TO, outputs_first))
    for expert, rows in _groups(counts):
        _product(rows_TI, grad_TO, rows, outputs_first, by_expert[expert])
    for expert, count in enumerate(counts):
        if not count:
            by_expert[expert].zero_()
    return grad_weight


def _add_products(
    weight: Tensor,
    rows_TI: Tensor,
    grad_TO: Tensor,
    counts: Sequence[int],
    outputs_first: bool,
) -> None:
    sizes = _order(rows_TI, grad_TO, outputs_first)
    total = weight.main_grad.view(len(counts), *sizes)  # type: ignore[attr-defined]
    scratch = rows_TI.new_empty(sizes)
    for expert, rows in _groups(counts):
        total[expert].add_(_product(rows_TI, grad_TO, rows, outputs_first, scratch))
    # megatron-core's hook adds what autograd has made, unless this says that it is there.
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]


def _order(rows_TI: Tensor, grad_TO: Tensor, outputs_first: bool) -> tuple[int, int]:
    inputs, outputs = rows_TI.shape[1], grad_TO.shape[1]
    return (outputs, inputs) if outputs_first else (inputs, outputs)
