"""Scores by |a|, the magnitude of a neuron's activation: the score of the paper."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mone_megatron.methods.score import Neurons, Score

if TYPE_CHECKING:
    from torch import Tensor


def abs_activation(neurons: Neurons) -> Tensor:
    """Returns |a|."""
    return neurons.activation.abs()


METHOD = Score(
    name="abs_activation",
    formula="|a|",
    source="arXiv 2510.05781",
    function=abs_activation,
    reads=frozenset({"activation"}),
    fused="mone_megatron.kernels.triton_scores:weight_score",
)
