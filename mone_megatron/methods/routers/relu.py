"""Routes by ReLU: a token goes to each expert with a logit above 0, which is its weight.

The router is differentiable everywhere but at 0, and a token's number of experts is open. A loss on
the weights, whose coefficient ``model.router.density`` steers, brings it to the target; the share
of tokens that an expert gets weighs its part, so that loads become even.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mone_megatron.methods.router import Router, balanced_l1

if TYPE_CHECKING:
    from torch import Tensor


def relu(logits_NA: Tensor) -> Tensor:
    """Returns the weights ``[N, A]`` of the chosen experts, and 0 at others."""
    return logits_NA.relu()


METHOD = Router(
    name="relu",
    formula="the experts with a logit above 0, weighed by it",
    source="ReMoE, arXiv 2412.14711",
    assign=lambda logits_NA, settings: relu(logits_NA),
    fixed_count=False,
    loss=balanced_l1,
)
