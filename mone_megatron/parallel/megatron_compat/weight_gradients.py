"""Lets gradients of linear layers be added in place, on CPU.

megatron-core does so by a CUDA kernel of apex (``gradient_accumulation_fusion``). Without it each
gradient is a matrix of its own first, which is then added to those of the microbatches before.
"""

from __future__ import annotations

from torch import Tensor, nn


class _OnCPU:
    """Stands where the library expects apex's module ``fused_weight_gradient_mlp_cuda``."""

    @staticmethod
    def wgrad_gemm_accum_fp32(rows_TI: Tensor, grad_TO: Tensor, total_OI: Tensor) -> None:
        """Adds the gradient of a weight to ``total_OI``: of T rows, I inputs and O outputs."""
        total_OI.addmm_(grad_TO.t(), rows_TI)


def provide_weight_gradients_on_cpu() -> None:
    """Gives megatron-core's linear layers what :func:`add_weight_gradient_in_place` needs."""
    from megatron.core.tensor_parallel import layers

    layers.fused_weight_gradient_mlp_cuda = _OnCPU


def add_weight_gradients_in_place(model: nn.Module) -> None:
    """Lets linear layers in fp32 add their gradients to ``main_grad``, on CPU.

    Weights that embeddings share are left out: those have another gradient, which autograd adds.

    Args:
        model: wrapped for data parallelism, so that parameters have a ``main_grad``.
    """
    import torch
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
    )

    shared = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, VocabParallelEmbedding)
    }
    for module in model.modules():
        if not isinstance(module, ColumnParallelLinear | RowParallelLinear):
            continue
        # None where the layer is given another one's weight.
        weight = module.weight
        if weight is None or id(weight) in shared or not hasattr(weight, "main_grad"):
            continue
        if weight.dtype is weight.main_grad.dtype is torch.float32:
            module.gradient_accumulation_fusion = True
