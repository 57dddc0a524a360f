"""Says what to prune: scores, shares, how many neurons stay.

It needs no torch: refusals are to be quick.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mone_megatron.methods.scores import SCORES as TRAINING_SCORES

RANDOM, BOTTOM_K = "random", "bottom_k"
# Name -> how neurons are ranked; the lowest are pruned. Training's scores, and two controls.
SCORES: dict[str, str] = {score.name: score.formula for score in TRAINING_SCORES} | {
    RANDOM: "at random, from --seed",
    BOTTOM_K: "-|a|: prunes the largest, a control",
}
# They need |a| itself, which experts with a gate of their own (gpt-oss) do not define.
NEED_ACTIVATION = frozenset(
    {BOTTOM_K} | {score.name for score in TRAINING_SCORES if "activation" in score.reads}
)
DEFAULT_SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
TARGETS = ("routed", "shared", "dense")
_NOTHING = "none"


@dataclass(frozen=True)
class Choice:
    """Holds what to prune in one layer: ``share`` of the neurons of each expert, by ``score``."""

    score: str
    share: float


@dataclass(frozen=True)
class Plan:
    """Holds what to prune in every layer; :func:`plan` makes it.

    Attributes:
        score: what ranks neurons in all layers; ``none`` when nothing is pruned.
        shares: one a decoder layer, in [0, 1).
    """

    score: str
    shares: tuple[float, ...]

    def at(self, layer: int) -> Choice | None:
        """Returns what to prune in a layer; None for nothing."""
        share = self.shares[layer]
        return Choice(self.score, share) if share else None


def plan(score: str, shares: Sequence[float]) -> Plan:
    """Returns the plan that prunes ``shares[layer]`` of each layer's neurons by ``score``.

    Nothing is the same plan by every score, so that it is measured once.
    """
    return Plan(score if any(shares) else _NOTHING, tuple(float(share) for share in shares))


def uniform(score: str, share: float, layers: int) -> Plan:
    """Returns the plan with the same share in every layer."""
    return plan(score, (share,) * layers)


def dense(layers: int) -> Plan:
    """Returns the plan of the model as it is, which prunes nothing."""
    return plan(_NOTHING, (0.0,) * layers)


def kept_neurons(share: float, neurons: int) -> int:
    """Returns how many neurons stay: ``round((1 - share) * neurons)``, but at least one."""
    return max(1, round((1 - share) * neurons))


def check_scores(scores: Sequence[str]) -> tuple[str, ...]:
    """Returns the scores, all of them known and each once.

    Raises:
        ValueError: one is unknown or named twice.
    """
    for position, score in enumerate(scores):
        if score not in SCORES:
            raise ValueError(f"--scores: {score!r} is unknown; use some of {', '.join(SCORES)}")
        if score in scores[:position]:
            raise ValueError(f"--scores: {score} is named twice; name it once")
    return tuple(scores)


def check_shares(shares: Sequence[float], option: str = "--shares") -> tuple[float, ...]:
    """Returns the shares to prune, each once, in order.

    Raises:
        ValueError: one is outside [0, 1).
    """
    for share in shares:
        if not 0 <= share < 1:
            raise ValueError(f"{option}: {share:g} is not in [0, 1), the share that is pruned")
    return tuple(sorted(set(shares)))


def check_tops(tops: Sequence[float]) -> tuple[float, ...]:
    """Returns the shares of the largest activations to give thresholds for, each once, in order.

    Raises:
        ValueError: one is outside (0, 1].
    """
    for top in tops:
        if not 0 < top <= 1 or math.isnan(top):
            raise ValueError(f"--top: {top:g} is not in (0, 1], a share of the largest activations")
    return tuple(sorted(set(tops)))
