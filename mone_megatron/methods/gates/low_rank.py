"""Computes the gate by two thin matrices: all neurons of an expert share the first.

A token activates h q + q f + 2 h K weights of an expert instead of h f + 2 h K. With q = h and the
first matrix the identity it is the full gate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mone_megatron.methods.gate import Gate, GateSize, GateWeight, Products, Weights

if TYPE_CHECKING:
    from torch import Tensor


def weights(size: GateSize) -> Mapping[str, GateWeight]:
    """Returns A, B and the up projection.

    Gate projections begin with the variance of full ones: x A has that of x G, h s^2 for tokens of
    unit variance and s = ``model.init_std``, and B with a standard deviation of 1 / sqrt(q) keeps
    the variance. Were both drawn with s, the gates would be sqrt(q) s times as large: almost none,
    and SiLU, whose value and slope near 0 are about g / 2, would almost close the experts.
    """
    return {
        "gate_in_weight": GateWeight((size.rank, size.hidden)),
        "gate_out_weight": GateWeight((size.neurons, size.rank), size.rank**-0.5, absolute=True),
        "up_weight": GateWeight((size.neurons, size.hidden)),
    }


def project(rows_TH: Tensor, weights: Weights, by: Products) -> tuple[Tensor, Tensor]:
    """Returns gate and up projections ``[T, F]``; ranks that share an expert gather x A."""
    latent_TQ = by.whole(by.product(rows_TH, weights["gate_in_weight"]))
    gate_TF = by.product(latent_TQ, weights["gate_out_weight"])
    return gate_TF, by.product(rows_TH, weights["up_weight"])


def problem(size: GateSize) -> str | None:
    """Returns what is wrong with a rank above h, which would only cost more."""
    if size.rank > size.hidden:
        return f"is more than model.hidden_size={size.hidden}; use {size.hidden} or less"
    return None


METHOD = Gate(
    name="low_rank",
    formula="g = (x A) B",
    source="arXiv 2501.13074",
    weights=weights,
    project=project,
    gate_parameters=lambda size: size.rank * (size.hidden + size.neurons),
    gate_inputs=lambda size: size.rank,
    up_inputs=lambda size: size.hidden,
    latent=lambda size: size.rank,
    problem=problem,
)
