"""Lets each expert decide for itself: it takes a token where its score is above a threshold.

The score is ``scale |x A| - bias``, of a low-rank projection A and two numbers of the expert; it is
also the weight. Nothing compares experts. Two losses, of which a token's and an expert's view is
one each, press on the scores with the coefficient that ``model.router.density`` steers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from mone_megatron.methods.bound import Above
from mone_megatron.methods.router import (
    Linear,
    RankOptions,
    RoutedWeights,
    Router,
    RouterSettings,
    RouterWeight,
    norms,
    projections,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Options(RankOptions):
    """Holds the options."""

    threshold: Annotated[float, Above(0)] = 0.05
    """The score from which on an expert takes a token."""


def weights(settings: RouterSettings) -> Mapping[str, RouterWeight]:
    """Returns the projections, and two numbers of an expert: scores begin as norms are."""
    return {
        **projections(settings),
        "score_norm.weight": RouterWeight((settings.experts,), initial=1.0),
        "score_bias": RouterWeight((settings.experts,), initial=0.0),
    }


def scores(
    tokens: Tensor, held: Mapping[str, Tensor], linear: Linear, settings: RouterSettings
) -> Tensor:
    """Returns scale times norm less bias, ``[..., A]``."""
    norm = norms(tokens, held, linear, settings)
    return norm * held["score_norm.weight"].to(norm.dtype) - held["score_bias"].to(norm.dtype)


def routing_free(scores_NA: Tensor, threshold: float) -> Tensor:
    """Returns the scores ``[N, A]`` that reach the threshold, which is above 0, and 0 at others."""
    return scores_NA * (scores_NA >= threshold)


def both_views(routed: RoutedWeights) -> Tensor:
    """Returns this rank's part of half of each view's mean of density times mean weight.

    An expert's density is its share of the tokens, a token's density its share of the experts.
    """
    weights_NA = routed.weights_NA.float()
    experts = weights_NA.shape[-1]
    of_experts_A = routed.tokens_A.float() / routed.tokens
    by_expert = (of_experts_A * weights_NA.sum(dim=0) / routed.tokens).mean()
    of_tokens_N = (routed.weights_NA > 0).float().mean(dim=-1)
    by_token = (of_tokens_N * weights_NA.sum(dim=-1) / experts).sum() / routed.tokens
    return (by_expert + by_token) / 2


METHOD = Router(
    name="routing_free",
    formula="the experts whose own score scale |x A| - bias reaches a threshold, weighed by it",
    source="Routing-Free MoE, arXiv 2604.00801",
    weights=weights,
    logits=scores,
    assign=lambda logits_NA, settings: routing_free(logits_NA, settings.options.threshold),
    fixed_count=False,
    options=Options,
    latent=lambda settings: settings.experts * settings.rank,
    loss=both_views,
)
