"""Lets each expert choose its tokens: those of a microbatch to which it gives most weight.

Loads are even without a loss, and tokens go to different numbers of experts. Whether an expert
takes a token depends on the others, later ones too, so what it trains cannot write a text as it was
trained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mone_megatron.methods.router import Router

if TYPE_CHECKING:
    from torch import Tensor


def expert_choice(logits_NA: Tensor, experts_per_token: int) -> Tensor:
    """Returns the weights ``[N, A]`` of the chosen experts, and 0 at others.

    Args:
        logits_NA: the router's logits of N tokens and A experts.
        experts_per_token: k: each expert takes N k / A tokens, rounded, and at least one.
    """
    tokens, experts = logits_NA.shape
    scores_NA = logits_NA.float().softmax(dim=-1)
    count = min(tokens, max(1, round(tokens * experts_per_token / experts)))
    # Sorted stably, so that of equal scores the first token's counts.
    best_CA = scores_NA.detach().sort(dim=0, descending=True, stable=True).indices[:count]
    chosen_NA = scores_NA.new_zeros(scores_NA.shape).bool().scatter(0, best_CA, True)
    return (scores_NA * chosen_NA).type_as(logits_NA)


METHOD = Router(
    name="expert_choice",
    formula="for each expert, the N k / A tokens with the largest weights",
    source="arXiv 2202.09368",
    assign=lambda logits_NA, settings: expert_choice(logits_NA, settings.experts_per_token),
    fixed_count=False,
    causal=False,
    reads_batch=True,
)
