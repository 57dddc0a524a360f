"""Computes what the neuron balance loss, which keeps all neurons in use, is made of.

The loss itself is a method (:mod:`mone_megatron.methods.losses`): a function of sums of the
weights of neurons over the tokens of an expert.

"The tokens" are those of one microbatch, like megatron-core's ``aux_loss``, whatever the layout:
the callers sum over the ranks that share a microbatch (see :mod:`.layer`).

Shape suffixes: T tokens (rows), F neurons of one expert on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from mone_megatron.kernels.reference import TINY


@dataclass(frozen=True)
class NeuronBalance:
    """Holds the settings of the loss: ``mone.balance`` in the configuration."""

    coeff: float = 0.0
    kind: str = "switch"
    weights: Literal["selected", "all"] = "selected"
    normalize: bool = True


class _AllReduceSum(torch.autograd.Function):
    """Sums over a group whose ranks each add a term to the loss; so it sums gradients, too."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, value: Tensor, group: dist.ProcessGroup
    ) -> Tensor:
        ctx.group = group  # type: ignore[attr-defined]
        value = value.clone()
        dist.all_reduce(value, group=group)
        return value

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)  # type: ignore[attr-defined]
        return grad, None


class AttachedLinear(torch.autograd.Function):
    """Gives sums of weights the gradient of a loss that is linear in them, times megatron-core's
    scale of auxiliary losses, when ``hidden``, which is passed on, gets its own.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: Tensor,
        weight_sum_SF: Tensor,
        slope_SF: Tensor,
        coeff: float,
    ) -> Tensor:
        """Returns ``hidden``; the gradient of the sums will be ``slope_SF * coeff``, scaled."""
        ctx.save_for_backward(slope_SF)
        ctx.coeff = coeff  # type: ignore[attr-defined]
        return hidden

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor, Tensor, None, None]:
        """Returns the gradients of ``hidden``, as it is, and of the sums."""
        (slope_SF,) = ctx.saved_tensors  # type: ignore[attr-defined]
        scale = MoEAuxLossAutoScaler.main_loss_backward_scale
        factor = ctx.coeff if scale is None else scale * ctx.coeff  # type: ignore[attr-defined]
        return grad, slope_SF * factor, None, None


def sum_over_ranks(weight_sum: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Returns the sum over the ranks of a group, each of which adds a term to the loss."""
    summed: Tensor = _AllReduceSum.apply(weight_sum, group)
    return summed


def neuron_weights(
    *,
    activation_TF: Tensor,
    mask_TF: Tensor,
    weights: Literal["selected", "all"],
    normalize: bool,
    neuron_group: dist.ProcessGroup | None = None,
    signed: bool = False,
) -> Tensor:
    """Returns each neuron's weight for each token: |a|, masked and normalised as configured.

    Args:
        activation_TF: ``a = SiLU(g)``.
        mask_TF: bool, True at kept neurons.
        weights: over the kept neurons only, or over all.
        normalize: divide by the token's sum, so that weights cannot be "balanced" by shrinking.
        neuron_group: the ranks that share the neurons of a row, or None.
        signed: a instead of |a|.

    Returns:
        fp32 ``[T, F]``; with ``normalize`` each whole row sums to 1.
    """
    weights_TF = activation_TF.float()
    if not signed:
        weights_TF = weights_TF.abs()
    if weights == "selected":
        weights_TF = weights_TF * mask_TF
    if not normalize:
        return weights_TF
    total_T1 = weights_TF.sum(dim=-1, keepdim=True)
    if neuron_group is not None:
        total_T1 = sum_over_ranks(total_T1, neuron_group)
    return weights_TF / total_T1.clamp_min(TINY)
