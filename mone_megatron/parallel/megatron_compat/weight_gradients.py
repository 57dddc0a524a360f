"""Lets gradients of linear layers and embeddings be added in place, on CPU in fp32.

megatron-core does so for linear layers by a CUDA kernel of apex (``gradient_accumulation_fusion``).
Without it each gradient is a matrix of its own first, which is then added to those of the
microbatches before; that of an embedding is zero but for the rows of a microbatch's tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional
from torch import Tensor, nn


class _OnCPU:
    """Stands where the library expects apex's module ``fused_weight_gradient_mlp_cuda``."""

    @staticmethod
    def wgrad_gemm_accum_fp32(rows_TI: Tensor, grad_TO: Tensor, total_OI: Tensor) -> None:
        """Adds the gradient of a weight to ``total_OI``: of T rows, I inputs and O outputs."""
        total_OI.addmm_(grad_TO.t(), rows_TI)


class _Rows(torch.autograd.Function):
    """Takes the rows of tokens from an embedding, and adds their gradients to ``main_grad``."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, tokens: Tensor, weight_VH: Tensor
    ) -> Tensor:
        ctx.save_for_backward(tokens, weight_VH)
        return torch.nn.functional.embedding(tokens, weight_VH)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[None, None]:
        tokens, weight_VH = ctx.saved_tensors  # type: ignore[attr-defined]
        weight_VH.main_grad.index_add_(0, tokens.flatten(), grad.flatten(0, -2))
        # megatron-core's hook adds what autograd has made, unless this says that it is there.
        weight_VH.grad_added_to_main_grad = True
        return None, None


class _Functional:
    """Stands where the library's layers expect ``torch.nn.functional``."""

    @staticmethod
    def embedding(tokens: Tensor, weight_VH: Tensor) -> Tensor:
        """Returns the rows of ``weight_VH`` that ``tokens`` name."""
        if not getattr(weight_VH, "adds_to_main_grad", False):
            return torch.nn.functional.embedding(tokens, weight_VH)
        rows: Tensor = _Rows.apply(tokens, weight_VH)
        return rows

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.nn.functional, name)


def provide_weight_gradients_on_cpu() -> None:
    """Gives megatron-core's layers what :func:`add_weight_gradients_in_place` needs."""
    from megatron.core.tensor_parallel import layers

    layers.fused_weight_gradient_mlp_cuda = _OnCPU
    layers.F = _Functional()


def add_weight_gradients_in_place(model: nn.Module) -> None:
    """Lets linear layers and embeddings in fp32 add their gradients to ``main_grad``, on CPU.

    A weight that an embedding and the output layer share is left out: it has two gradients, which
    autograd adds.

    Args:
        model: wrapped for data parallelism, so that parameters have a ``main_grad``.
    """
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
    )

    linear, embeddings = (
        [module for module in model.modules() if isinstance(module, kinds)]
        for kinds in ((ColumnParallelLinear, RowParallelLinear), VocabParallelEmbedding)
    )
    for module in linear:
        # None where the layer is given another one's weight.
        if module.weight is not None and _adds_fp32(module.weight):
            module.gradient_accumulation_fusion = True
    if all(module.weight is not None for module in linear):
        for module in embeddings:
            module.weight.adds_to_main_grad = _adds_fp32(module.weight)


def _adds_fp32(weight: Tensor) -> bool:
    main_grad = getattr(weight, "main_grad", None)
    return main_grad is not None and weight.dtype is main_grad.dtype is torch.float32
