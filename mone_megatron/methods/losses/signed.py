"""Sums load times mean signed activation over neurons: the loss as the paper's equations have it.

``P_k`` is the mean over the tokens of what is kept of neuron k, without norm and with its sign. It
can fall below 0, and shrinks with the activations. Of absolute values it is ``switch`` with
``mone.balance.normalize=false``; which of the two the authors computed is not known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mone_megatron.methods.loss import NeuronLoss, SelectionSums
from mone_megatron.methods.losses.switch import switch

if TYPE_CHECKING:
    from torch import Tensor


def signed(sums: SelectionSums) -> Tensor:
    """Returns the loss of this rank's tokens, an fp32 scalar."""
    return switch(sums)


METHOD = NeuronLoss(
    name="signed",
    formula="load times mean signed activation, summed over neurons",
    source="arXiv 2510.05781, as its review quotes it",
    function=signed,
    signed=True,
    normalized=False,
)
