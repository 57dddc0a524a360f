"""Scores by |g|, the magnitude of a neuron's gate projection."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mone_megatron.methods.score import Neurons, Score

if TYPE_CHECKING:
    from torch import Tensor


def abs_gate(neurons: Neurons) -> Tensor:
    """Returns |g|."""
    return neurons.gate.abs()


METHOD = Score(
    name="abs_gate",
    formula="|g|",
    source="an ablation of arXiv 2510.05781",
    function=abs_gate,
    reads=frozenset({"gate"}),
    fused="mone_megatron.kernels.triton_scores:gate_score",
)
