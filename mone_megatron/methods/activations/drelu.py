"""Computes max(g, 0) max(u, 0): both projections are rectified (Turbo Sparse)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mone_megatron.methods.activation import Activation

if TYPE_CHECKING:
    from torch import Tensor


def rectified_gate(gate: Tensor) -> Tensor:
    """Returns ``max(g, 0)``, elementwise; a function of its own, which names the activation."""
    return gate.relu()


def rectified_up(up: Tensor) -> Tensor:
    """Returns ``max(u, 0)``, elementwise."""
    return up.relu()


METHOD = Activation(
    name="drelu",
    formula="ReLU(g) ReLU(u)",
    source="arXiv 2406.05955",
    reference="mone_megatron.methods.activations.drelu:rectified_gate",
    up="mone_megatron.methods.activations.drelu:rectified_up",
    rectified_gate="relu",
    keeps_input=False,
    # The up projection, whose rectified values are kept beside it.
    intermediates=1,
)
