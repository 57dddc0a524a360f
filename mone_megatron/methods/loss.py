"""Defines what a neuron loss is: a function of sums over the tokens of a microbatch.

It imports no torch, so that names can be checked without.

Shape suffixes: S segments (one expert's tokens of one microbatch), F neurons of one expert on this
rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SelectionSums:
    """Holds what a loss is made of.

    Attributes:
        weight_sum_SF: fp32, the sum of each neuron's weights over this rank's tokens of a segment,
            or over all ranks' for a loss that is not linear; carries the gradient. Which weights,
            and whether they are normalised, are ``mone.balance.weights`` and
            ``mone.balance.normalize``.
        kept_SF: how many tokens of a segment keep each neuron, over all ranks that hold tokens of
            the segment.
        tokens_S: tokens of a segment, over the same ranks.
        kept_share: K/f, the target density.
        num_experts: experts of the layer over all ranks, the denominator of the mean.
        neurons: f, of the whole expert.
    """

    weight_sum_SF: Tensor
    kept_SF: Tensor
    tokens_S: Tensor
    kept_share: float
    num_experts: int
    neurons: int

    @property
    def mean_SF(self) -> Tensor:
        """Returns each neuron's mean weight over the tokens of a segment, fp32."""
        return self.weight_sum_SF / self.tokens_S.clamp_min(1).unsqueeze(-1).float()

    @property
    def used_S1(self) -> Tensor:
        """Returns 1 for segments with tokens and 0 for others, fp32 ``[S, 1]``."""
        return (self.tokens_S > 0).unsqueeze(-1).float()


@dataclass(frozen=True)
class NeuronLoss:
    """Describes one loss over the use of neurons; ``mone.balance.kind`` names it.

    Attributes:
        name: the loss's name in the configuration.
        formula: what it computes, for tables.
        source: the paper or place that it comes from.
        function: this rank's part of the loss, an fp32 scalar without the coefficient: a sum over
            segments and neurons, so that the parts of all ranks of a pipeline stage, added up and
            divided by the number of microbatches, are the mean over microbatches. Of a loss that is
            not linear each rank with tokens of a segment computes the same, and takes its share.
        linear: whether it is linear in the weights, so that ranks with different tokens of a
            segment need not know each other's weights.
        signed: whether weights are activations with their sign instead of their size.
        slope: of a linear loss, the factor of each neuron's sum of weights, fp32 ``[S, F]``: with
            it the gradient is known without autograd. None where autograd is to find it.
        normalized: the value of ``mone.balance.normalize`` that it is written for; None for either.
    """

    name: str
    formula: str
    source: str
    function: Callable[[SelectionSums], Tensor]
    linear: bool = True
    slope: Callable[[SelectionSums], Tensor] | None = None
    signed: bool = False
    normalized: bool | None = None
