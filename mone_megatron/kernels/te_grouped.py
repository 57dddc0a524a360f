"""Computes grouped products by Transformer Engine (2.11 or later): cuBLAS, all experts at once.

Not run here: no machine with Transformer Engine was at hand. The tests give the same calls to a
stand-in that multiplies as ``general_grouped_gemm`` documents.

cuBLAS needs the number of rows of each expert on the host. The alltoall dispatcher of megatron-core
brings it there anyway; after another dispatcher reading it stops the host once a layer, which
``torch.nn.functional.grouped_mm`` does not.

Shape suffixes: T rows, sorted by expert; E experts; I values in, O values out.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from typing import Any, Protocol, cast

import torch
from torch import Tensor


class GroupedGemm(Protocol):
    """Is ``transformer_engine.pytorch.cpp_extensions.general_grouped_gemm``, as it is called here.

    One product a pair of ``A`` and ``B``: ``B @ A.T`` for layout TN, ``B @ A`` for NN and
    ``B.T @ A`` for NT. With ``single_output`` the results lie one after the other in ``out[0]``.
    Pairs without rows give no rows, or zeros.
    """

    def __call__(
        self,
        A: list[Tensor],
        B: list[Tensor],
        out: list[Tensor],
        quantization_params: list[None],
        out_dtype: torch.dtype,
        *,
        layout: str,
        m_splits: list[int],
        grad: bool,
        single_output: bool,
        accumulate: bool = False,
    ) -> object:
        """Writes the products to ``out``, or adds them to what is there (``accumulate``)."""


@cache
def have_transformer_engine() -> bool:
    """Returns whether Transformer Engine's modules for torch are installed, and can be imported.

    Raises:
        ValueError: it is installed, but not for this torch or this GPU's driver. megatron-core
            would go on without it, in silence.
    """
    if importlib.util.find_spec("transformer_engine") is None:
        return False
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError, RuntimeError) as error:
        why = " ".join(str(error).split())
        raise ValueError(
            "transformer_engine: it is installed, but its modules for torch cannot be imported "
            f"({why}); install those that were built for this torch, or uninstall it"
        ) from error
    return True


def transformer_engines() -> GroupedGemm:
    """Returns Transformer Engine's function; not run here.

    Raises:
        ImportError: when Transformer Engine is not installed.
    """
    from transformer_engine.pytorch.cpp_extensions import general_grouped_gemm

    return cast(GroupedGemm, general_grouped_gemm)


def grouped_mm(
    rows_TI: Tensor,
    weight_EIO: Tensor,
    counts_E: Tensor,
    gemm: GroupedGemm | None = None,
    parameter: Tensor | None = None,
) -> Tensor:
    """Returns each expert's rows times its matrix.

    Args:
        rows_TI: the rows of all experts, sorted by expert.
        weight_EIO: contiguous, or the transpose of a contiguous ``[E, O, I]``: neither is copied.
        counts_E: int64, rows of each expert.
        gemm: the function that multiplies; Transformer Engine's unless given.
        parameter: what the matrices are a view of. If it has ``main_grad`` and
            ``adds_to_main_grad`` is set on it, the products of the backward pass are added there,
            in its dtype, and no gradient of all experts is made for each microbatch.

    Returns:
        ``[T, O]``.

    Raises:
        ValueError: for matrices that would have to be copied.
    """
    transposed = not weight_EIO.is_contiguous()
    stored = weight_EIO.mT if transposed else weight_EIO
    if not stored.is_contiguous():
        raise ValueError(
            f"grouped_mm: a weight of strides {weight_EIO.stride()} is neither contiguous nor the "
            "transpose of one that is"
        )
    if parameter is not None and getattr(parameter, "adds_to_main_grad", False):
        stored = stored.detach()
    else:
        parameter = None
    output: Tensor = _GroupedProduct.apply(
        rows_TI, stored, parameter, counts_E.tolist(), transposed, gemm or transformer_engines()
    )
    return output


@cache
def _no_gradient(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def _told_to_autograd(parameter: Tensor) -> Tensor:
    """Returns a gradient that megatron-core passes over: it has been added already.

    Autograd has to be given one, or the hook would not run that sends gradients on.
    """
    parameter.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    # A tensor that nobody else holds is taken over without a copy.
    return _no_gradient(parameter.shape, parameter.dtype, parameter.device).detach()


class _GroupedProduct(torch.autograd.Function):
    """Computes the product; ``stored`` is ``[E, O, I]`` when transposed, else ``[E, I, O]``."""

    @staticmethod
    def forward(
        ctx: Any,
        rows_TI: Tensor,
        stored: Tensor,
        parameter: Tensor | None,
        counts: list[int],
        transposed: bool,
        gemm: GroupedGemm,
    ) -> Tensor:
        ctx.save_for_backward(rows_TI, stored)
        ctx.counts, ctx.transposed, ctx.gemm = counts, transposed, gemm
        ctx.parameter = parameter
        return _rows_product(rows_TI, stored, counts, transposed=transposed, grad=False, gemm=gemm)

    @staticmethod
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        rows_TI, stored = ctx.saved_tensors
        counts, transposed, gemm = ctx.counts, ctx.transposed, ctx.gemm
        grad_TO = grad_TO.contiguous()
        grad_rows_TI = grad_stored = grad_parameter = None
        if ctx.needs_input_grad[0]:
            grad_rows_TI = _rows_product(
                grad_TO, stored, counts, transposed=not transposed, grad=True, gemm=gemm
            )
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            parameter: Tensor | None = ctx.parameter
            if parameter is None:
                into = grad_stored = torch.empty_like(stored)
            else:
                into = parameter.main_grad.view_as(stored)  # type: ignore[attr-defined]
                grad_parameter = _told_to_autograd(parameter)
            of_rows, of_grads = list(rows_TI.split(counts)), list(grad_TO.split(counts))
            gemm(
                of_rows if transposed else of_grads,
                of_grads if transposed else of_rows,
                list(into.unbind(0)),
                [None] * len(counts),
                into.dtype,
                layout="NT",
                m_splits=counts,
                grad=True,
                single_output=False,
                accumulate=parameter is not None,
            )
        return grad_rows_TI, grad_stored, grad_parameter, None, None, None


def _rows_product(
    rows: Tensor,
    stored: Tensor,
    counts: list[int],
    *,
    transposed: bool,
    grad: bool,
    gemm: GroupedGemm,
) -> Tensor:
    """Returns each expert's rows times its stored matrix, or times its transpose."""
    output = rows.new_empty(len(rows), stored.shape[1 if transposed else 2])
    gemm(
        list(stored.unbind(0)),
        list(rows.contiguous().split(counts)),
        [output],
        [None] * len(counts),
        rows.dtype,
        layout="TN" if transposed else "NN",
        m_splits=counts,
        grad=grad,
        single_output=True,
    )
    return output
