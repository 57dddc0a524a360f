"""Routes by ReLU: a token goes to each expert with a logit above 0, which is its weight.

The router is differentiable everywhere but at 0, and a token's number of experts is open. A loss on
the weights, whose coefficient ``model.router.density`` steers, brings it to the target; the share
of tokens that an expert gets weighs its part, so that loads become even.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mone_megatron.methods.router import RoutedWeights, Router

if TYPE_CHECKING:
    from torch import Tensor


def relu(logits_NA: Tensor) -> Tensor:
    """Returns the weights ``[N, A]`` of the chosen experts, and 0 at others."""
    return logits_NA.relu()


def balanced_l1(routed: RoutedWeights) -> Tensor:
    """Returns this rank's part of sum over experts of A f P, an fp32 scalar.

    P is the mean weight of an expert, f its share of tokens as a part of k. It is Switch
    Transformer's loss of weights that need not sum to 1, so that it shrinks them, too.
    """
    weights_NA = routed.weights_NA.float()
    share_A = routed.tokens_A.float() / (routed.tokens * routed.experts_per_token)
    mean_A = weights_NA.sum(dim=0) / routed.tokens
    return weights_NA.shape[-1] * (share_A * mean_A).sum()


METHOD = Router(
    name="relu",
    formula="the experts with a logit above 0, weighed by it",
    source="ReMoE, arXiv 2412.14711",
    reference="mone_megatron.mone.routers:ReLURouter",
    fixed_count=False,
    own_weights=True,
    loss=balanced_l1,
)
