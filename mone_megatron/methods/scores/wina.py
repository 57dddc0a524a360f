"""Scores by |a u| times the norm of the neuron's down-projection row: what the neuron adds.

This is the half of WINA that concerns the input of the down projection; the official method also
prunes the inputs of the other projections.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mone_megatron.methods.score import Neurons, Score

if TYPE_CHECKING:
    from torch import Tensor


def wina(neurons: Neurons) -> Tensor:
    """Returns |a u| ||Wd||, with the norm of each neuron's row of the down projection."""
    return neurons.product.abs() * neurons.down_norm


METHOD = Score(
    name="wina",
    formula="|a u| times the norm of the neuron's row of the down projection (WINA)",
    source="WINA",
    function=wina,
    reads=frozenset({"product", "down_norm"}),
)
