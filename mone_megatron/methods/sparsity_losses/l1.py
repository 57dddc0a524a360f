"""Averages over tokens the sum of absolute hidden values, over a token's experts and neurons.

Neurons that a token does not need are pushed to zero, so that fewer carry what it does need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mone_megatron.methods.sparsity_loss import HiddenSums, SparsityLoss

if TYPE_CHECKING:
    from torch import Tensor


def l1(sums: HiddenSums) -> Tensor:
    """Returns this rank's part of the mean, an fp32 scalar."""
    return sums.abs_sum_SF.sum() / sums.tokens


METHOD = SparsityLoss(
    name="l1",
    formula="mean over tokens of the sum of |hidden values|",
    source="the penalty of the lasso, on hidden values",
    function=l1,
)
