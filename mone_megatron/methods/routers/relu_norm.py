"""Routes by ReLU and weighs by an RMSNorm of it: BlockFFN's router.

The ReLU decides which experts a token goes to; the norm makes their weights as large for one token
as for another, however many experts it has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mone_megatron.methods.router import (
    Linear,
    Router,
    RouterSettings,
    RouterWeight,
    balanced_l1,
    one_row_each,
)

if TYPE_CHECKING:
    from torch import Tensor

_EPSILON = 1e-6


def weights(settings: RouterSettings) -> Mapping[str, RouterWeight]:
    """Returns a row and a scale for each expert."""
    return {
        **one_row_each(settings),
        "score_norm.weight": RouterWeight((settings.experts,), initial=1.0),
    }


def normed(
    tokens: Tensor, held: Mapping[str, Tensor], linear: Linear, settings: RouterSettings
) -> Tensor:
    """Returns the RMSNorm over all experts of the rectified logits, ``[..., A]``."""
    logits = linear(tokens, held["weight"]).relu()
    mean = logits.square().mean(dim=-1, keepdim=True)
    return logits * (mean + _EPSILON).rsqrt() * held["score_norm.weight"].to(logits.dtype)


METHOD = Router(
    name="relu_norm",
    formula="the experts with a logit above 0, weighed by the RMSNorm of these",
    source="BlockFFN, arXiv 2507.08771, with ReMoE's loss",
    weights=weights,
    logits=normed,
    assign=lambda logits_NA, settings: logits_NA.relu(),
    fixed_count=False,
    loss=balanced_l1,
)
