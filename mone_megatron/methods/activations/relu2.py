"""Computes max(g, 0) squared (Primer)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mone_megatron.methods.activation import Activation

if TYPE_CHECKING:
    from torch import Tensor


def squared_relu(gate: Tensor) -> Tensor:
    """Returns ``max(g, 0)^2``, elementwise."""
    return gate.relu().square()


METHOD = Activation(
    name="relu2",
    formula="ReLU(g)^2",
    source="arXiv 2109.08668",
    reference="mone_megatron.methods.activations.relu2:squared_relu",
    keeps_input=False,
    # ReLU's result, beside its square.
    intermediates=1,
    fused="mone_megatron.kernels.triton_activations:RELU2",
)
