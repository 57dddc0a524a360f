"""Scores by g with its sign: the rule of Mixture-of-Channels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mone_megatron.methods.score import Neurons, Score

if TYPE_CHECKING:
    from torch import Tensor


def signed_gate(neurons: Neurons) -> Tensor:
    """Returns g."""
    return neurons.gate


METHOD = Score(
    name="signed_gate",
    formula="g (Mixture-of-Channels)",
    source="Mixture-of-Channels",
    function=signed_gate,
    reads=frozenset({"gate"}),
    signed=True,
    fused="mone_megatron.kernels.triton_scores:gate_score",
)
