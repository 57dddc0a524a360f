"""Routes by sigmoids that do not compete: the k largest, each weighed by its own.

Unlike a softmax, or megatron-core's sigmoid scores, the weights of a token need not sum to 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mone_megatron.methods.router import Router

if TYPE_CHECKING:
    from torch import Tensor


def largest_sigmoids(logits_NA: Tensor, experts_per_token: int) -> Tensor:
    """Returns the sigmoids ``[N, A]`` of the largest logits, ties to the lowest, 0 at others."""
    order_NA = logits_NA.detach().sort(dim=-1, descending=True, stable=True).indices
    best_NK = order_NA[:, :experts_per_token]
    chosen_NA = logits_NA.new_zeros(logits_NA.shape).scatter(-1, best_NK, 1.0)
    return logits_NA.sigmoid() * chosen_NA


METHOD = Router(
    name="sigmoid_topk",
    formula="the k experts with the largest logits, each weighed by the sigmoid of its own",
    source="sigma-MoE, arXiv 2310.10837",
    assign=lambda logits_NA, settings: largest_sigmoids(logits_NA, settings.experts_per_token),
)
