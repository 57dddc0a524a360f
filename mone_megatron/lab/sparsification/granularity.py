"""Removes experts and neurons at the shares that a study prunes neurons at, to compare them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import comb
from typing import Any

import numpy as np

from mone_megatron.evaluation.estimates import difference
from mone_megatron.evaluation.harness import Score
from mone_megatron.lab.sparsification.calibration import Calibration
from mone_megatron.lab.sparsification.findings import Kind, Removal
from mone_megatron.lab.sparsification.plans import (
    MOST_SETS,
    NAEE,
    NAEE_SKIP,
    NEED_EXPERTS,
    NEURONS,
    OTHER_EXPERTS,
    REAP,
    SUPER_EXPERTS,
    ExpertsGone,
    ExpertsSkipped,
    LayerChoice,
    Made,
    NeuronsGone,
    Plan,
    kept_neurons,
)
from mone_megatron.lab.sparsification.ranking import packed
from mone_megatron.lab.sparsification.removal import (
    ExpertStatistics,
    SetErrors,
    WeightRatios,
    kept_for_good,
    least_experts,
    super_experts,
)
from mone_megatron.lab.sparsification.use import Use

# A score that is none: what is removed ranks nothing for a token.
_NO_SCORE = "none"


@dataclass(frozen=True)
class RemovalPlan:
    """Holds a plan that removes, and what is shown of it; see :class:`.findings.Removal`."""

    way: str
    share: float
    held: float
    plan: Plan
    experts: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Remover:
    """Makes plans that remove.

    Attributes:
        calibration: says what matters least.
        seed: of the other experts that are removed beside super experts.
        say: tells what is left out, and why.
    """

    calibration: Calibration
    seed: int
    say: Callable[[str], None]

    def plans(self, ways: Sequence[str], shares: Sequence[float]) -> list[RemovalPlan]:
        """Returns the plans of every way at every share above 0 that it can remove.

        Raises:
            ValueError: the calibration text does not reach an expert whose neurons are to be
                ranked.
        """
        found: list[RemovalPlan] = []
        for way in ways:
            if way == SUPER_EXPERTS:
                found += self._super_experts()
                continue
            possible = [share for share in shares if share and self._can(way, share)]
            missing = [share for share in possible if self._kept(way, share) is None]
            if missing:
                for share, layers in zip(missing, self._calibrate(way, missing), strict=True):
                    self.calibration.results.add(self._key(way, share), {"layers": layers})
            found += [self._plan(way, share) for share in possible]
        return found

    def _key(self, way: str, share: float) -> dict[str, Any]:
        return self.calibration.key(removal=way, share=share)

    def _kept(self, way: str, share: float) -> Any:
        return self.calibration.results.get(self._key(way, share))

    def _can(self, way: str, share: float) -> bool:
        """Returns whether a way can remove a share, saying why it cannot."""
        if way == NEURONS:
            return True
        label = self.calibration.label
        for number, index in self.calibration.routed():
            kind = self.calibration.kind(number, index)
            if way == NAEE_SKIP:
                most = (kind.uses - 1) / kind.uses
                if share > most:
                    self.say(
                        f"{label}: {way} leaves every token one of its {kind.uses} experts: a "
                        f"share of {share:g} is left out, {most:g} is the most"
                    )
                    return False
                continue
            gone = _gone(share, kind)
            if not gone:
                self.say(f"{label}: {share:g} of {kind.experts} experts is none: left out of {way}")
                return False
            if way == NAEE and comb(kind.experts, gone) > MOST_SETS:
                self.say(
                    f"{label}: {way} would try {comb(kind.experts, gone):,} sets of {gone} of "
                    f"{kind.experts} experts, more than {MOST_SETS:,}: a share of {share:g} is "
                    "left out"
                )
                return False
        return True

    def _calibrate(self, way: str, shares: Sequence[float]) -> list[list[Any]]:
        """Returns what is removed of every layer, as for JSON, for each share."""
        calibration = self.calibration
        if way in (NEURONS, REAP):
            if way == NEURONS:
                return [self._neurons(share) for share in shares]
            saliency = {place: one.saliency_E for place, one in self.statistics.items()}
            return self._gone_of(shares, lambda place, count: least_experts(saliency[place], count))
        if way == NAEE:
            errors = {
                place: SetErrors(
                    calibration.kind(*place).experts,
                    sorted({self._count(place, share) for share in shares}),
                )
                for place in calibration.routed()
            }
            calibration.watch(errors, "sets of experts")
            return self._gone_of(shares, lambda place, count: errors[place].best(count))
        assert way == NAEE_SKIP, way
        ratios = {place: WeightRatios() for place in calibration.routed()}
        calibration.watch(ratios, "weights of experts")
        return [
            self._of_routed({place: one.beta(share) for place, one in ratios.items()})
            for share in shares
        ]

    def _gone_of(
        self,
        shares: Sequence[float],
        least: Callable[[tuple[int, int], int], tuple[int, ...]],
    ) -> list[list[Any]]:
        """Returns the experts that go at each share, as ``least`` says of a place and a number."""
        return [
            self._of_routed(
                {
                    place: list(least(place, self._count(place, share)))
                    for place in self.calibration.routed()
                }
            )
            for share in shares
        ]

    @cached_property
    def statistics(self) -> dict[tuple[int, int], ExpertStatistics]:
        """Returns what every place puts out, of one pass over the text for all ways that ask."""
        kinds = {place: self.calibration.kind(*place) for place in self.calibration.places()}
        found = {
            place: ExpertStatistics(kind.experts, kind.neurons) for place, kind in kinds.items()
        }
        self.calibration.watch(found, "outputs of experts and neurons")
        return found

    def _neurons(self, share: float) -> list[list[str]]:
        layers = []
        for layer in self.calibration.layers:
            kept = []
            for index in range(len(layer.kinds)):
                seen = self.statistics[layer.number, index]
                if not bool(seen.tokens_E.all()):
                    lost = int((seen.tokens_E == 0).nonzero()[0])
                    raise ValueError(
                        f"--calibration: no token of it reached expert {lost} of layer "
                        f"{layer.number}, whose neurons are to be ranked; give a longer text"
                    )
                kept.append(packed(kept_for_good(seen.neurons_EF, share)))
            layers.append(kept)
        return layers

    def _of_routed(self, by_place: Mapping[tuple[int, int], Any]) -> list[Any]:
        """Returns what is removed of each layer's routed experts; None of layers without any."""
        by_layer = {number: removed for (number, _), removed in by_place.items()}
        return [by_layer.get(layer.number) for layer in self.calibration.layers]

    def _count(self, place: tuple[int, int], share: float) -> int:
        return _gone(share, self.calibration.kind(*place))

    def _plan(self, way: str, share: float) -> RemovalPlan:
        layers = self.calibration.results.read(
            self._key(way, share), lambda kept: list(kept["layers"])
        )
        if way == NEURONS:
            kept = [NeuronsGone(tuple(layer)) if layer else None for layer in layers]
            return self._removal(way, share, self._held_neurons(share), kept)
        if way == NAEE_SKIP:
            skipped = [None if beta is None else ExpertsSkipped(float(beta)) for beta in layers]
            return self._removal(way, share, 1.0, skipped)
        return self._without(way, share, [tuple(layer or ()) for layer in layers])

    def _without(self, way: str, share: float, gone: Sequence[tuple[int, ...]]) -> RemovalPlan:
        """Returns the plan without some experts of each layer."""
        held = total = 0
        for layer, experts in zip(self.calibration.layers, gone, strict=True):
            for kind in layer.kinds:
                left = kind.experts - (len(experts) if kind.target == "routed" else 0)
                held, total = held + left * kind.neurons, total + kind.experts * kind.neurons
        # Of layers that lose nothing it is counted, too, what they compute.
        choices = [
            ExpertsGone(experts) if layer.kinds else None
            for layer, experts in zip(self.calibration.layers, gone, strict=True)
        ]
        named = tuple((number, expert) for number, experts in enumerate(gone) for expert in experts)
        return self._removal(way, share, held / total, choices, named)

    def _held_neurons(self, share: float) -> float:
        kinds = [kind for layer in self.calibration.layers for kind in layer.kinds]
        kept = sum(kept_neurons(share, kind.neurons) * kind.experts for kind in kinds)
        return kept / sum(kind.neurons * kind.experts for kind in kinds)

    def _removal(
        self,
        way: str,
        share: float,
        held: float,
        choices: Sequence[LayerChoice | None],
        experts: tuple[tuple[int, int], ...] = (),
    ) -> RemovalPlan:
        made = Made(way, f"{share:g}", tuple(choices))
        plan = Plan(_NO_SCORE, (share,) * len(choices), made)
        return RemovalPlan(way, share, held, plan, experts)

    def _super_experts(self) -> list[RemovalPlan]:
        calibration = self.calibration
        places = calibration.routed()
        key = calibration.key(removal=SUPER_EXPERTS)
        if calibration.results.get(key) is None:
            largest = [self.statistics[place].largest_E.tolist() for place in places]
            calibration.results.add(key, {"largest": largest})
        largest = calibration.results.read(key, lambda kept: list(kept["largest"]))
        found = [(places[at][0], expert) for at, expert in super_experts(largest)]
        generator = np.random.default_rng(self.seed)
        gone: dict[str, list[tuple[int, ...]]] = {}
        for way in (SUPER_EXPERTS, OTHER_EXPERTS):
            gone[way] = []
            for layer in calibration.layers:
                own = [expert for number, expert in found if number == layer.number]
                if way == OTHER_EXPERTS and own:
                    # As many of the same layer.
                    (experts,) = {k.experts for k in layer.kinds if k.target == "routed"}
                    others = [expert for expert in range(experts) if expert not in own]
                    own = generator.choice(others, min(len(own), len(others)), False).tolist()
                gone[way].append(tuple(sorted(own)))
        share = len(found) / sum(len(row) for row in largest)
        return [self._without(way, share, layers) for way, layers in gone.items()]


def _gone(share: float, kind: Kind) -> int:
    """Returns how many experts a share is; one stays at least."""
    return min(round(share * kind.experts), kind.experts - 1)


def check_removals(ways: Sequence[str], routed: bool, model: str) -> None:
    """Checks that a model has what is to be removed.

    Raises:
        ValueError: it has no routed experts, or they are not pruned, and experts are to go.
    """
    for way in ways:
        if way in NEED_EXPERTS and not routed:
            raise ValueError(
                f"--remove: {way} removes routed experts, and of {model} none are pruned; use "
                f"{NEURONS}, or a mixture of experts with --apply-to routed"
            )


def removal_of(
    plan: RemovalPlan, use: Use, scores: tuple[Score, ...], base: tuple[Score, ...]
) -> Removal:
    """Returns what a plan did."""
    one, other = scores[0], base[0]
    assert one.metric == "loss", one.metric
    change = difference(one.estimate, other.estimate, same_samples=one.samples == other.samples)
    return Removal(plan.way, plan.share, plan.held, use, scores, change, plan.experts)
