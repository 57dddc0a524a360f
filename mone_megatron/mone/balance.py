"""The neuron balance loss: keeps all neurons of an expert in use.

For expert i with T_i tokens: ``f_k`` is the share of its tokens that keep neuron k, divided by
K/f, so that 1 is perfectly even; ``P_k`` is the mean weight of neuron k. The loss is

    L = mean over experts of  sum_k f_k * P_k

with ``f_k`` taken as a constant. With normalised weights L is 1 when every neuron is kept equally
often, and that is its minimum among selections with equal weights (Cauchy-Schwarz: then
``P_k = f_k / f`` and ``sum_k f_k = f``). An expert without tokens counts 0.

"The tokens" are those of one microbatch, like megatron-core's ``aux_loss``, whatever the layout:
the callers sum over the ranks that share a microbatch (see :mod:`.layer`).

Shape suffixes: T tokens (rows), F neurons of one expert on this rank, S segments (one expert's
tokens of one microbatch).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from mone_megatron.kernels.reference import TINY


@dataclass(frozen=True)
class NeuronBalance:
    """The loss's settings: ``mone.balance`` in the configuration."""

    coeff: float = 0.0
    weights: Literal["selected", "all"] = "selected"
    normalize: bool = True


class _AllReduceSum(torch.autograd.Function):
    """Sum over a group whose ranks each add their own term to the loss: so the gradient, too."""

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


def neuron_weights(
    *,
    activation_TF: Tensor,
    mask_TF: Tensor,
    weights: Literal["selected", "all"],
    normalize: bool,
    neuron_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The weight of each neuron for each token: |a|, masked and normalised as configured.

    Args:
        activation_TF: ``a = SiLU(g)``.
        mask_TF: bool, True at kept neurons.
        weights: over the kept neurons only, or over all.
        normalize: divide by the token's sum, so that weights cannot be "balanced" by shrinking.
        neuron_group: the ranks that share the neurons of a row, or None.

    Returns:
        fp32 ``[T, F]``; with ``normalize`` each whole row sums to 1.
    """
    weights_TF = activation_TF.float().abs()
    if weights == "selected":
        weights_TF = weights_TF * mask_TF
    if not normalize:
        return weights_TF
    total_T1 = weights_TF.sum(dim=-1, keepdim=True)
    if neuron_group is not None:
        total_T1 = _AllReduceSum.apply(total_T1, neuron_group)
    return weights_TF / total_T1.clamp_min(TINY)


def neuron_balance_loss(
    *,
    weights_TF: Tensor,
    segment_ST: Tensor,
    kept_SF: Tensor,
    tokens_S: Tensor,
    kept_share: float,
    num_experts: int,
) -> Tensor:
    """This rank's part of the loss, summed over microbatches; without the coefficient.

    Args:
        weights_TF: from :func:`neuron_weights`; carries the gradient.
        segment_ST: from :func:`mone_megatron.kernels.reference.segment_matrix`.
        kept_SF: how many tokens of a segment keep each neuron, over all ranks that hold tokens of
            the segment.
        tokens_S: tokens of a segment, over the same ranks.
        kept_share: K/f.
        num_experts: experts of the layer over all ranks, the denominator of the mean.

    Returns:
        fp32 scalar. Summed over the ranks of a pipeline stage and divided by the number of
        microbatches it is the mean of L over microbatches.
    """
    return balance_of_sums(
        weight_sum_SF=segment_ST @ weights_TF,
        kept_SF=kept_SF,
        tokens_S=tokens_S,
        kept_share=kept_share,
        num_experts=num_experts,
    )


def balance_of_sums(
    *, weight_sum_SF: Tensor, kept_SF: Tensor, tokens_S: Tensor, kept_share: float, num_experts: int
) -> Tensor:
    """:func:`neuron_balance_loss` when the weights of each segment are summed already."""
    tokens_S1 = tokens_S.clamp_min(1).unsqueeze(-1).float()
    load_SF = kept_SF.float() / tokens_S1 / kept_share
    return (load_SF.detach() * weight_sum_SF / tokens_S1).sum() / num_experts
