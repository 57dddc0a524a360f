"""What turns the gate projection g into the weights a of the neurons: ``model.activation``."""

from __future__ import annotations

from mone_megatron.kernels.reference import ACTIVATIONS, squared_relu

__all__ = ["ACTIVATIONS", "squared_relu"]
