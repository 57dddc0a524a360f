"""Multiplies the rows of each expert by its matrix, on CPU in fp32, one product an expert.

Forward and input gradients are those of ``torch.nn.functional.grouped_mm``, bit for bit, without
its bookkeeping. The gradient of the weights can go straight to where gradients are added up
(megatron-core's ``main_grad``): the product of an expert is added to it while it is made, which
equals a sum afterwards up to rounding, and experts without rows are passed over, where autograd
makes, fills and adds a gradient of all experts in every microbatch. Where there is a C compiler all
experts are one call (:mod:`.compiled_cpu`) of the same products, else each is a call of torch's.

Shape suffixes: T rows, E experts, I values of a row, O values of its product.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from mone_megatron.kernels.compiled_cpu import address, compiled_products, with_rows


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
        assert weight.is_contiguous()
        outputs = weight[0].numel() // rows_TI.shape[1]
        product_TO = rows_TI.new_empty(len(rows_TI), outputs)
        _multiply(rows_TI, weight, counts, product_TO, outputs_first=outputs_first)
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
        grad_rows_TI = None
        if ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
            grad_rows_TI = torch.empty(rows_TI.shape)
            _multiply(grad_TO, weight, counts, grad_rows_TI, outputs_first=not outputs_first)
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


def _multiply(
    rows_TI: Tensor,
    weight: Tensor,
    counts: Sequence[int],
    out_TO: Tensor,
    *,
    outputs_first: bool,
) -> None:
    """Writes each expert's rows times its matrix into ``out_TO``, which is contiguous."""
    if functions := compiled_products():
        library, product = functions
        rows_TI = with_rows(rows_TI)
        library.grouped_rows(
            product, len(counts), _numbers(counts), rows_TI.shape[1], out_TO.shape[1],
            outputs_first, address(rows_TI), rows_TI.stride(0), address(weight), address(out_TO),
        )  # fmt: skip
        return
    matrix_EIO = _matrices(weight, rows_TI.shape[1], outputs_first)
    parts = rows_TI.split_with_sizes(counts), matrix_EIO.unbind(), out_TO.split_with_sizes(counts)
    for count, rows, matrix, out in zip(counts, *parts, strict=True):
        if count:
            torch.mm(rows, matrix, out=out)


def _add_products(from_T: Tensor, into_T: Tensor, counts: Sequence[int], total_E: Tensor) -> None:
    """Adds each expert's gradient to its total; those of experts without rows stay as they are."""
    if _compiled_products(from_T, into_T, counts, total_E, adding=True):
        return
    parts = from_T.split_with_sizes(counts), into_T.split_with_sizes(counts), total_E.unbind()
    for count, rows, others, total in zip(counts, *parts, strict=True):
        if count:
            total.addmm_(rows.t(), others)


def _write_products(from_T: Tensor, into_T: Tensor, counts: Sequence[int], total_E: Tensor) -> None:
    """Writes each expert's gradient: zeros for experts without rows."""
    if _compiled_products(from_T, into_T, counts, total_E, adding=False):
        return
    parts = from_T.split_with_sizes(counts), into_T.split_with_sizes(counts), total_E.unbind()
    for rows, others, total in zip(*parts, strict=True):
        # The product of no rows is written, too.
        torch.mm(rows.t(), others, out=total)


def _compiled_products(
    from_T: Tensor, into_T: Tensor, counts: Sequence[int], total_E: Tensor, *, adding: bool
) -> bool:
    """Adds or writes all experts' gradients in one call; returns whether there is such a call."""
    functions = compiled_products()
    if functions is None:
        return False
    library, product = functions
    from_T, into_T = with_rows(from_T), with_rows(into_T)
    library.grouped_weights(
        product, len(counts), _numbers(counts), from_T.shape[1], into_T.shape[1], address(from_T),
        from_T.stride(0), address(into_T), into_T.stride(0), address(total_E), adding,
    )  # fmt: skip
    return True


def _numbers(counts: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(counts))(*counts)
