"""Routes by the cosine between a token and an expert, both in a small space, over a temperature.

A token's length and most of its directions do not matter then, which keeps the tokens of an expert
from collapsing onto its own direction.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mone_megatron.methods.router import (
    Linear,
    RankOptions,
    Router,
    RouterSettings,
    RouterWeight,
)

if TYPE_CHECKING:
    from torch import Tensor

# The first temperature, the least that it counts as, and the least length of a vector.
_TEMPERATURE, _COLDEST, _SHORTEST = 0.3, 0.01, 1e-6


def weights(settings: RouterSettings) -> Mapping[str, RouterWeight]:
    """Returns a direction for each expert, the projection of tokens, and the temperature."""
    return {
        "weight": RouterWeight((settings.experts, settings.rank)),
        "projection": RouterWeight((settings.rank, settings.hidden)),
        "temperature": RouterWeight((1,), initial=_TEMPERATURE),
    }


def cosines(
    tokens: Tensor, held: Mapping[str, Tensor], linear: Linear, settings: RouterSettings
) -> Tensor:
    """Returns cosines over the temperature, ``[..., A]``."""
    projected = linear(tokens, held["projection"])
    directions_AQ = held["weight"].to(projected.dtype)
    lengths = projected.norm(dim=-1, keepdim=True).clamp_min(_SHORTEST)
    lengths_A1 = directions_AQ.norm(dim=-1, keepdim=True).clamp_min(_SHORTEST)
    logits = linear(projected / lengths, directions_AQ / lengths_A1)
    return logits / held["temperature"].to(logits.dtype).clamp_min(_COLDEST)


METHOD = Router(
    name="cosine",
    formula="the k experts with the largest cosine with x P, over a learned temperature",
    source="X-MoE, arXiv 2204.09179",
    weights=weights,
    logits=cosines,
    latent=lambda settings: 2 * settings.rank,
    options=RankOptions,
)
