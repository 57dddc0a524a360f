"""Defines what a sparsity loss is: a function of how large routed experts' hidden values are.

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
class HiddenSums:
    """Holds what a loss is made of.

    A hidden value is act(gate) * up of a neuron that is kept, before the router's probability.

    Attributes:
        abs_sum_SF: fp32, the sum of each neuron's absolute hidden values over this rank's tokens of
            a segment; carries the gradient.
        tokens: tokens of one microbatch, over all ranks that hold some of it. Each of them goes to
            several experts.
        num_experts: experts of the layer over all ranks.
    """

    abs_sum_SF: Tensor
    tokens: int
    num_experts: int


@dataclass(frozen=True)
class SparsityLoss:
    """Describes one loss over hidden values; ``model.sparsity_loss`` names it.

    Attributes:
        name: the loss's name in the configuration.
        formula: what it computes, for tables.
        source: the paper or place that it comes from.
        function: this rank's part of the loss, an fp32 scalar without the coefficient: a sum over
            segments and neurons, so that the parts of all ranks of a pipeline stage, added up and
            divided by the number of microbatches, are the mean over microbatches. None computes
            nothing.
    """

    name: str
    formula: str
    source: str
    function: Callable[[HiddenSums], Tensor] | None
