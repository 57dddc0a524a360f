"""Defines the straight-through estimator: only the forward pass is masked.

Shape suffixes: T tokens (rows), F neurons of one expert on this rank.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor


class _Masked(torch.autograd.Function):
    """Multiplies by a mask forward, and by one backward."""

    @staticmethod
    def forward(ctx: Any, hidden_TF: Tensor, mask_TF: Tensor) -> Tensor:
        """Returns the masked values."""
        return hidden_TF * mask_TF

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Returns the gradient of the values as if there were no mask."""
        return grads[0], None


def masked_straight_through(hidden_TF: Tensor, mask_TF: Tensor) -> Tensor:
    """Returns values at the kept neurons, with the gradient of all of them (arXiv 2407.10969).

    Args:
        hidden_TF: the values of all neurons, a * u.
        mask_TF: bool, True at kept neurons. A NaN spreads, as in a masked forward pass.
    """
    return cast(Tensor, _Masked.apply(hidden_TF, mask_TF))
