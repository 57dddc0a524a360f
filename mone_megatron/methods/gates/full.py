"""Computes the gate of all of a token by a matrix of its own, as large as the up projection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mone_megatron.methods.gate import Gate, GateSize, GateWeight, Products, Weights

if TYPE_CHECKING:
    from torch import Tensor


def weights(size: GateSize) -> Mapping[str, GateWeight]:
    """Returns both matrices as one weight, so that one product computes both."""
    return {"gate_up_weight": GateWeight((2, size.neurons, size.hidden))}


def project(rows_TH: Tensor, weights: Weights, by: Products) -> tuple[Tensor, Tensor]:
    """Returns gate and up projections ``[T, F]``."""
    return by.halves(by.product(rows_TH, weights["gate_up_weight"]))


METHOD = Gate(
    name="full",
    formula="g = x G",
    source="arXiv 2510.05781",
    weights=weights,
    project=project,
    gate_parameters=lambda size: size.hidden * size.neurons,
    gate_inputs=lambda size: size.hidden,
    up_inputs=lambda size: size.hidden,
    ranked=False,
)
