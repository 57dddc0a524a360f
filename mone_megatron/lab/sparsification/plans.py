"""Says what to prune: scores, rules, removals, shares, how many neurons stay.

It needs no torch: refusals are to be quick.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from mone_megatron.methods.scores import SCORES as TRAINING_SCORES

RANDOM, BOTTOM_K, CONTRIBUTION = "random", "bottom_k", "contribution"
# Name -> how neurons are ranked; the lowest are pruned. Training's scores, and two controls.
SCORES: dict[str, str] = {score.name: score.formula for score in TRAINING_SCORES} | {
    RANDOM: "at random, from --seed",
    BOTTOM_K: "-|a|: prunes the largest, a control",
    CONTRIBUTION: "the router's weight times `wina`: the norm of what it adds to its layer",
}
# They need |a| itself, which experts with a gate of their own (gpt-oss) do not define.
NEED_ACTIVATION = frozenset(
    {BOTTOM_K} | {score.name for score in TRAINING_SCORES if "activation" in score.reads}
)
# They are known before any projection is computed.
_READ_NOTHING = frozenset({RANDOM})
# How a score decides. Thresholds are those of CATS (arXiv 2404.08763, 2605.08575).
RANK, THRESHOLD = "rank", "threshold"
RULES: dict[str, str] = {
    RANK: "a token keeps equally many neurons of every expert, those with the largest scores",
    THRESHOLD: "a token keeps the neurons with scores above what calibration text says",
}
# Thresholds that are set by the error they make; see :mod:`.truncation`.
CETT = "cett"
# What is removed for good, or skipped; see :mod:`.removal`.
NEURONS, REAP, NAEE, NAEE_SKIP = "neurons", "reap", "naee", "naee_skip"
SUPER_EXPERTS, OTHER_EXPERTS = "super_experts", "other_experts"
REMOVALS: dict[str, str] = {
    NEURONS: "for good the neurons that add least: mean of the router's weight times `wina`",
    REAP: "for good the experts of least mean weighted output (arXiv 2510.13999)",
    NAEE: "for good the set of experts that changes the layer least (arXiv 2402.14800)",
    NAEE_SKIP: "of each token the experts with small weights beside its largest (the same)",
    SUPER_EXPERTS: "the few with outliers in their output, and as many others (arXiv 2507.23279)",
}
NEED_EXPERTS = frozenset(REMOVALS) - {NEURONS}
# Sets of experts that are tried of a layer at most.
MOST_SETS = 2000
# What a threshold is of.
LAYER, EXPERT = "layer", "expert"
THRESHOLD_OF: dict[str, str] = {
    LAYER: "one for all experts of a layer",
    EXPERT: "one for each expert",
}
# Windows of a few tokens say nothing about how scores are spread.
LEAST_CALIBRATION_TOKENS = 128
DEFAULT_SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
TARGETS = ("routed", "shared", "dense")
_NOTHING = "none"


@dataclass(frozen=True)
class Choice:
    """Holds what to prune in one layer: ``share`` of the neurons of each expert, by ``score``."""

    score: str
    share: float


@dataclass(frozen=True)
class Cut:
    """Holds the thresholds of one layer: neurons stay whose score is above theirs.

    Attributes:
        score: what is compared.
        thresholds: for each place of the layer, one for all its experts, or one for each of them.
    """

    score: str
    thresholds: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class NeuronsGone:
    """Holds the neurons of one layer that stay for every token.

    Attributes:
        kept: for each place of the layer, the bits ``[E, F]`` of those that stay, packed into bytes
            in hex; all of them stay where it is empty.
    """

    kept: tuple[str, ...]


@dataclass(frozen=True)
class ExpertsGone:
    """Holds the routed experts of one layer that are removed."""

    experts: tuple[int, ...]


@dataclass(frozen=True)
class ExpertsSkipped:
    """Skips a token's experts whose weight is below ``beta`` times its largest."""

    beta: float


# What is pruned in one layer.
LayerChoice: TypeAlias = Choice | Cut | NeuronsGone | ExpertsGone | ExpertsSkipped


@dataclass(frozen=True)
class Made:
    """Holds what calibration made of a setting.

    Attributes:
        how: the rule, or what else was asked for.
        detail: what else it was told, for people.
        choices: what is pruned in each layer; None where nothing is.
    """

    how: str
    detail: str
    choices: tuple[LayerChoice | None, ...] = field(repr=False)

    @property
    def digest(self) -> str:
        """Returns what tells the choices from others, in hex: whatever led to them."""
        return hashlib.sha256(repr(self.choices).encode()).hexdigest()


@dataclass(frozen=True)
class Plan:
    """Holds what to prune in every layer; :func:`plan` makes it.

    Attributes:
        score: what ranks neurons in all layers; ``none`` when nothing is pruned.
        shares: one a decoder layer, in [0, 1); of a plan that was made by calibration those that
            were wanted.
        made: None for the plain rule, which keeps equally many neurons of every token.
    """

    score: str
    shares: tuple[float, ...]
    made: Made | None = None

    @property
    def rule(self) -> str:
        """Returns the name of the rule."""
        return RANK if self.made is None else self.made.how

    def at(self, layer: int) -> LayerChoice | None:
        """Returns what to prune in a layer; None for nothing."""
        if self.made is not None:
            return self.made.choices[layer]
        share = self.shares[layer]
        return Choice(self.score, share) if share else None

    def key(self) -> dict[str, object]:
        """Returns what tells the plan from others, as for JSON."""
        named: dict[str, object] = {"score": self.score, "shares": list(self.shares)}
        if self.made is not None:
            named |= {"rule": self.made.how, "choices": self.made.digest}
        return named


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
    return check_named(scores, SCORES, "--scores")


def check_named(names: Sequence[str], known: Mapping[str, str], option: str) -> tuple[str, ...]:
    """Returns the names, all of them known and each once.

    Raises:
        ValueError: one is unknown or named twice.
    """
    for position, name in enumerate(names):
        if name not in known:
            raise ValueError(f"{option}: {name!r} is unknown; use some of {', '.join(known)}")
        if name in names[:position]:
            raise ValueError(f"{option}: {name} is named twice; name it once")
    return tuple(names)


def projections_before(score: str) -> int:
    """Returns how many of an expert's three projections a score needs of every neuron.

    One, the gate, or two, the gate and up projections; none for the random control.
    """
    if score in _READ_NOTHING or score == _NOTHING:
        return 0
    if score == CONTRIBUTION:
        return 2
    if score == BOTTOM_K:
        return 1
    return 2 if TRAINING_SCORES[score].reads_up else 1


def activated(before: int, computed: float, kept: float) -> float:
    """Returns the share of its experts' parameters that a token needs.

    Args:
        before: projections that are computed of every neuron; see :func:`projections_before`.
        computed: share of its experts that are computed at all.
        kept: share of all neurons that stay.
    """
    return (before * computed + (3 - before) * kept) / 3


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
