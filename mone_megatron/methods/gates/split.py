"""Computes the gate of the first q values of a token, and the up projection of the others.

It is the form of the Spark Transformer: a token activates q f + (h - q) K + h K weights of an
expert, and the expert has no more weights than two thirds of a usual one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mone_megatron.methods.gate import Gate, GateSize, GateWeight, Products, Weights

if TYPE_CHECKING:
    from torch import Tensor


def weights(size: GateSize) -> Mapping[str, GateWeight]:
    """Returns both matrices.

    Initial values are larger the fewer values of a token they multiply, so that both projections
    begin with the variance of full ones.
    """
    rest = max(size.hidden - size.rank, 1)
    return {
        "gate_weight": GateWeight((size.neurons, size.rank), (size.hidden / size.rank) ** 0.5),
        "up_weight": GateWeight((size.neurons, rest), (size.hidden / rest) ** 0.5),
    }


def project(rows_TH: Tensor, weights: Weights, by: Products) -> tuple[Tensor, Tensor]:
    """Returns gate and up projections ``[T, F]``."""
    first = weights["gate_weight"].shape[-1]
    gate_TF = by.product(rows_TH[..., :first], weights["gate_weight"])
    return gate_TF, by.product(rows_TH[..., first:], weights["up_weight"])


def problem(size: GateSize) -> str | None:
    """Returns what is wrong with a slice that leaves nothing for the up projection."""
    if size.rank >= size.hidden:
        return (
            f"leaves no values of model.hidden_size={size.hidden} to the up projection; use "
            f"{size.hidden - 1} or less"
        )
    return None


METHOD = Gate(
    name="split",
    formula="g = x[:q] G, u = x[q:] U",
    source="arXiv 2506.06644",
    weights=weights,
    project=project,
    gate_parameters=lambda size: size.rank * size.neurons,
    gate_inputs=lambda size: size.rank,
    up_inputs=lambda size: size.hidden - size.rank,
    problem=problem,
)
