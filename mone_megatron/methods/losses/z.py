"""Averages the squared logarithm of neurons' mean weights: the z-loss of routers, for neurons.

A mean weight of 1 / f, the even one of normalised weights, costs nothing; weights above and below
cost by the square of their orders of magnitude, so it also keeps raw weights from growing or
shrinking. A thousandth of the even weight is added, so that a neuron that nobody keeps costs a
finite number, (log 0.001)^2. An expert without tokens counts 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mone_megatron.methods.loss import NeuronLoss, SelectionSums

if TYPE_CHECKING:
    from torch import Tensor

_LEAST = 1e-3


def z(sums: SelectionSums) -> Tensor:
    """Returns this rank's part of the mean over experts and neurons, an fp32 scalar."""
    logs_SF = (sums.mean_SF * sums.neurons + _LEAST).log()
    return (logs_SF.square() * sums.used_S1).sum() / (sums.neurons * sums.num_experts)


METHOD = NeuronLoss(
    name="z",
    formula="mean over neurons of log(f P + 0.001)^2 of the mean weights P",
    source="after the z-loss of routers, arXiv 2202.08906",
    function=z,
    linear=False,
)
