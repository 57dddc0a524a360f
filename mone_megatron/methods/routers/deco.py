"""Routes by ReLU and scales the weights by a number that each expert learns: DECO's router.

The scale is apart from the choice, and may be of either sign: it balances what routed experts and a
shared expert contribute. The loss is the entropy of a token's weights before they are scaled, which
presses on the number of experts and does nothing for even loads; ``model.router.density`` steers
its coefficient, as the authors' runs do, from 1e-8 in steps of 1.002 or 1.001.

DECO has NormSiLU beside it, in experts without a gate: SiLU of an RMSNorm over an expert's neurons,
from which the mean over those of all experts, chosen or not, was taken before. Here experts have a
gate, and an activation is a function of one neuron alone, so that the router is what there is of
DECO (docs/method.md#what-is-not-here).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from mone_megatron.methods.bound import Above
from mone_megatron.methods.router import (
    RoutedWeights,
    Router,
    RouterSettings,
    RouterWeight,
    one_row_each,
)

if TYPE_CHECKING:
    from torch import Tensor

# What sums and shares are made larger by.
_EPSILON = 1e-5


@dataclass(frozen=True)
class Options:
    """Holds the options."""

    scale: Annotated[float, Above(0)] = 0.1
    """What the scale of each expert begins with."""


def weights(settings: RouterSettings) -> Mapping[str, RouterWeight]:
    """Returns a row and a scale for each expert."""
    return {
        **one_row_each(settings),
        "score_scale": RouterWeight((settings.experts,), initial=settings.options.scale),
    }


def scaled(weights_NA: Tensor, held: Mapping[str, Tensor], settings: RouterSettings) -> Tensor:
    """Returns the weights times the scales of the experts, ``[N, A]``."""
    return weights_NA * held["score_scale"].to(weights_NA.dtype)


def entropy(routed: RoutedWeights) -> Tensor:
    """Returns this rank's part of the mean entropy of a token's weights as shares of their sum."""
    weights_NA = routed.weights_NA.float()
    shares_NA = weights_NA / (weights_NA.sum(dim=-1, keepdim=True) + _EPSILON)
    return -(shares_NA * (shares_NA + _EPSILON).log()).sum() / routed.tokens


METHOD = Router(
    name="deco",
    formula="the experts with a logit above 0, weighed by it times a learned scale of the expert",
    source="DECO, arXiv 2605.10933",
    weights=weights,
    assign=lambda logits_NA, settings: logits_NA.relu(),
    weigh=scaled,
    fixed_count=False,
    options=Options,
    loss=entropy,
)
