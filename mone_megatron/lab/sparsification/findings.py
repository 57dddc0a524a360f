"""Holds what is found of a model: points of its curves, statistics, shares of its layers."""

from __future__ import annotations

from dataclasses import dataclass

from mone_megatron.evaluation.estimates import Difference
from mone_megatron.evaluation.harness import Score
from mone_megatron.lab.sparsification.budget import Probe
from mone_megatron.lab.sparsification.plans import NAEE_SKIP, RANK
from mone_megatron.lab.sparsification.statistics import LayerStatistics
from mone_megatron.lab.sparsification.use import Use
from mone_megatron.report.identified import Doubt


@dataclass(frozen=True)
class BudgetSettings:
    """Holds how shares are allotted to layers.

    Attributes:
        rise: the largest rise of the loss, nats a token.
        score: what ranks the neurons.
        shares: pruned shares that each layer's sensitivity is measured at, ascending, above 0.
    """

    rise: float
    score: str
    shares: tuple[float, ...]


@dataclass(frozen=True)
class Kind:
    """Describes one kind of neurons of a decoder layer.

    Attributes:
        target: ``routed``, ``shared`` or ``dense``.
        neurons: of one expert or MLP.
        own_kept: how many of them the model itself keeps.
        uses: experts of a token.
        experts: how many there are; 1 for an MLP.
    """

    target: str
    neurons: int
    own_kept: int
    uses: int
    experts: int = 1


@dataclass(frozen=True)
class Layer:
    """Describes what can be pruned in one decoder layer.

    Attributes:
        number: from 0.
        kinds: none where there is nothing.
    """

    number: int
    kinds: tuple[Kind, ...]

    @property
    def weight(self) -> int:
        """Returns how many neurons a token goes through."""
        return sum(kind.neurons * kind.uses for kind in self.kinds)


@dataclass(frozen=True)
class Point:
    """Holds what was measured of a model under a plan.

    Attributes:
        score: what ranks the neurons.
        share: asked for.
        pruned: share of the neurons of a token that is gone: a whole number of each expert's, and
            those that the model itself leaves out. Of thresholds as measured.
        scores: what was measured.
        changes: of each of ``scores``, its difference to the model as it is.
        rule: how the score decides.
        activated: share of its experts' parameters that a token needs, with the projections that
            the score reads of every neuron.
    """

    score: str
    share: float
    pruned: float
    scores: tuple[Score, ...]
    changes: tuple[Difference, ...]
    rule: str = RANK
    activated: float = 1.0


@dataclass(frozen=True)
class BudgetResult:
    """Holds the shares of the layers that keep a loss budget.

    Attributes:
        settings: what was asked.
        layers: numbers of the layers that were pruned.
        loss: of the model as it is, on the text that the shares were chosen on.
        sensitivity: ``[layers][shares]``, rises of the loss.
        best: the shares, with the rise of the loss as predicted and as measured.
        best_change: the measured rise with its standard error.
        probes: all that were measured.
        uniform_change: the rise when as many neurons are pruned with one share for all layers.
        elsewhere: the rise on the text that the study is about; None when that is the same.
    """

    settings: BudgetSettings
    layers: tuple[int, ...]
    loss: float
    sensitivity: tuple[tuple[float, ...], ...]
    best: Probe
    best_change: Difference
    probes: tuple[Probe, ...]
    uniform_change: Difference
    elsewhere: Difference | None

    @property
    def doubts(self) -> tuple[Doubt, ...]:
        """Returns why the shares may not be those of the budget.

        They are doubted where they end at the edge of what was tried.
        """
        best, most = self.best.allotment, max(self.settings.shares)
        found = []
        if not best.pruned:
            found.append(
                Doubt("bound", "nothing is pruned: no allotment that was measured keeps the budget")
            )
        at_most = sum(share >= most for share in best.shares)
        if at_most == len(best.shares):
            found.append(
                Doubt("bound", f"every layer is at {most:g}, the largest share that was tried: "
                      "more may fit in the budget")
            )  # fmt: skip
        elif at_most:
            found.append(
                Doubt("bound", f"{at_most} of {len(best.shares)} layers are at {most:g}, the "
                      "largest share that was tried")
            )  # fmt: skip
        return tuple(found)


@dataclass(frozen=True)
class Truncation:
    """Holds what truncation at a CETT does.

    Attributes:
        asked: the CETT that was asked for, or None.
        rise: the rise of the perplexity that was asked for, in percent, or None.
        cett: the one of the thresholds.
        calibrated: rise of the perplexity on the calibration text, in percent.
        measured: rise of the perplexity on the text of the study, in percent.
        change: rise of the loss there.
        use: what is computed there; its activation ratio is 1 - ``use.pruned``.
        thresholds: of each place of each layer.
    """

    asked: float | None
    rise: float | None
    cett: float
    calibrated: float
    measured: float
    change: Difference
    use: Use
    thresholds: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Removal:
    """Holds what removing experts or neurons does.

    Attributes:
        way: name of how they are chosen.
        share: asked for.
        held: share of the experts' parameters that are left to hold.
        use: what a token computes.
        scores: what was measured.
        change: of the loss.
        experts: those that are gone, as (layer, expert); none where neurons are gone or experts are
            skipped.
    """

    way: str
    share: float
    held: float
    use: Use
    scores: tuple[Score, ...]
    change: Difference
    experts: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Study:
    """Holds what was found of one model."""

    label: str
    where: str
    targets: tuple[str, ...]
    layers: tuple[Layer, ...]
    tokens: int
    dense: Point
    points: tuple[Point, ...]
    statistics: tuple[LayerStatistics, ...]
    budget: BudgetResult | None
    # How texts begin for it, in words.
    beginning: str = ""
    truncations: tuple[Truncation, ...] = ()
    removals: tuple[Removal, ...] = ()


@dataclass(frozen=True)
class Granularity:
    """Holds one way to do with less beside others.

    Attributes:
        name: of the way, or of the score and rule that prune the neurons of a token.
        share: asked for.
        held: share of the experts' parameters that are left to hold.
        activated: share of its experts' parameters that a token needs.
        pruned: share of its experts' neurons that it does not use.
        change: rise of the loss.
        per_token: whether it is chosen for each token.
    """

    name: str
    share: float
    held: float
    activated: float
    pruned: float
    change: Difference
    per_token: bool


def granularity(study: Study) -> list[Granularity]:
    """Returns what was removed of a model, and what was pruned of each token, in one list."""
    at = next(at for at, score in enumerate(study.dense.scores) if score.metric == "loss")
    rows = [
        Granularity(
            one.way,
            one.share,
            one.held,
            one.use.activated,
            one.use.pruned,
            one.change,
            one.way == NAEE_SKIP,
        )
        for one in study.removals
    ]
    rows += [
        Granularity(
            f"{point.score}, per token" if point.rule == RANK else f"{point.score}, {point.rule}",
            point.share,
            1.0,
            point.activated,
            point.pruned,
            point.changes[at],
            True,
        )
        for point in study.points
        if point.share
    ]
    return rows
