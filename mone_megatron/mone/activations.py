"""What turns the gate projection g into the weights a of the neurons."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mone_megatron.kernels.reference import Activate


def squared_relu(gate: Tensor) -> Tensor:
    """``max(g, 0)^2`` (Primer)."""
    return F.relu(gate).square()


# model.activation -> the function of the gate projection.
ACTIVATIONS: dict[str, Activate] = {
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "relu": F.relu,
    "relu2": squared_relu,
}
