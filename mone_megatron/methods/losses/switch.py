"""Sums load times mean weight over neurons: Switch Transformer's loss, for neurons.

For expert i with T_i tokens: ``f_k`` is the share of its tokens that keep neuron k, divided by
K/f, so that 1 is perfectly even; ``P_k`` is the mean weight of neuron k. The loss is

    L = mean over experts of  sum_k f_k * P_k

with ``f_k`` taken as a constant. With normalised weights L is 1 when every neuron is kept equally
often, and that is its minimum among selections with equal weights (Cauchy-Schwarz: then
``P_k = f_k / f`` and ``sum_k f_k = f``). An expert without tokens counts 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mone_megatron.methods.loss import NeuronLoss, SelectionSums

if TYPE_CHECKING:
    from torch import Tensor


def slope(sums: SelectionSums) -> Tensor:
    """Returns what the loss multiplies each sum of weights by, fp32 ``[S, F]``."""
    tokens_S = sums.tokens_S.clamp_min(1).float()
    return sums.kept_SF.float() / (
        tokens_S.square() * (sums.kept_share * sums.num_experts)
    ).unsqueeze(-1)


def switch(sums: SelectionSums) -> Tensor:
    """Returns the loss of this rank's tokens, an fp32 scalar."""
    return (slope(sums).detach() * sums.weight_sum_SF).sum()


METHOD = NeuronLoss(
    name="switch",
    formula="load times mean weight, summed over neurons",
    source="arXiv 2510.05781, after arXiv 2101.03961",
    function=switch,
    slope=slope,
)
