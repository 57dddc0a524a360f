"""Scores by |a| times the norm of the neuron's down-projection row: WINA without up projection."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mone_megatron.methods.score import Neurons, Score

if TYPE_CHECKING:
    from torch import Tensor


def wina_activation(neurons: Neurons) -> Tensor:
    """Returns |a| ||Wd||, with the norm of each neuron's row of the down projection."""
    return neurons.activation.abs() * neurons.down_norm


METHOD = Score(
    name="wina_activation",
    formula="|a| times that norm",
    source="an ablation of WINA",
    function=wina_activation,
    reads=frozenset({"activation", "down_norm"}),
)
