"""Alerts: which expert of which layer has stopped working as it should.

A pure function of the panels seen so far (:mod:`mone_megatron.train.panel`) and of
``logging.alerts``, so a resumed run knows what it knew by reading its panels again. docs/metrics.md
has the rules in words.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from mone_megatron.config.mone import metrics_of
from mone_megatron.config.schema import Config
from mone_megatron.methods.rule import count_kept
from mone_megatron.train.panel import LayerUse, Mlp, Panel

Kind: TypeAlias = Literal["dead_expert", "dead_neurons", "load_collapse", "shrinking_weights"]
# Of a layer: its router, or one kind of its MLPs.
Part: TypeAlias = Literal["router"] | Mlp

# Uses of each neuron (tokens of each expert), were the load even, below which chance decides how
# many are never used.
ENOUGH_USES = 10
# The part of its excess over 1 that the load's balance must lose to count as improved.
IMPROVED = 0.2


@dataclass(frozen=True)
class Place:
    """Names what an alert is about; ``expert`` is None for all experts of a layer together."""

    kind: Kind
    part: Part
    layer: int
    expert: int | None


@dataclass(frozen=True)
class Alert:
    """Is one line of ``alerts.jsonl``: something begins, or ends.

    Attributes:
        step: of the panel that decided it.
        event: which of the two.
        kind: what is wrong.
        part: of the layer.
        layer: from 1.
        expert: from 0; of an alert about all of them the worst one when it began, if any.
        value: measured at this step.
        threshold: of ``logging.alerts``.
        message: all of this in words, and what to look at.
    """

    step: int
    event: Literal["begin", "end"]
    kind: Kind
    part: Part
    layer: int
    expert: int | None
    value: float
    threshold: float
    message: str


@dataclass(frozen=True)
class _Finding:
    """Holds what one rule finds at one place at one step."""

    place: Place
    value: float
    threshold: float
    # None: not to be judged at this step.
    wrong: bool | None
    words: str
    # That of the place, or the worst of the layer.
    expert: int | None


@dataclass
class _State:
    """Counts how often in a row a finding contradicted what is told (``active``)."""

    active: bool = False
    contradicted: int = 0
    # That was named when it began.
    expert: int | None = None


@dataclass(frozen=True)
class _Reference:
    """Holds a layer at the panel where its weights were largest."""

    step: int
    activation: float
    by_expert: tuple[float, ...]
    loss: float
    balance: float


class AlertMonitor:
    """Sees panel after panel; tells what begins and what ends."""

    def __init__(self, config: Config) -> None:
        """Starts with nothing seen."""
        self.config = config
        self.settings = config.logging.alerts
        self._states: dict[Place, _State] = {}
        self._references: dict[tuple[Mlp, int], _Reference] = {}

    @property
    def active(self) -> list[Place]:
        """Returns the places of what has begun and not ended."""
        return [place for place, state in self._states.items() if state.active]

    def update(self, panel: Panel) -> list[Alert]:
        """Judges one panel. Steps must ascend."""
        alerts = []
        for use in panel.layers:
            for finding in self._findings(panel.step, use):
                state = self._states.setdefault(finding.place, _State())
                if finding.wrong is None or math.isnan(finding.value):
                    continue
                state.contradicted = state.contradicted + 1 if finding.wrong != state.active else 0
                if state.contradicted < self.settings.patience:
                    continue
                state.active, state.contradicted = finding.wrong, 0
                if finding.wrong:
                    state.expert = finding.expert
                alerts.append(_alert(panel.step, finding, state.expert))
        return alerts

    def _findings(self, step: int, use: LayerUse) -> Iterator[_Finding]:
        if use.mlp == "routed":
            yield from self._router(use)
        if "load_entropy" in use.experts:
            yield from self._neurons(step, use)
            yield from self._shrinking(step, use)

    def _router(self, use: LayerUse) -> Iterator[_Finding]:
        tokens = use.experts["tokens"]
        total, experts = sum(tokens), len(tokens)
        chosen = self.config.model.experts_per_token
        if experts == chosen:
            return
        enough = total >= ENOUGH_USES * experts
        least = self.settings.dead_expert
        for expert, count in enumerate(tokens):
            share = count * experts / total if total else math.nan
            yield _Finding(
                Place("dead_expert", use.mlp, use.layer, expert),
                share,
                least,
                share < least if enough else None,
                f"{share:.3g} of a fair share of the tokens, below "
                f"logging.alerts.dead_expert={least:g}; look at "
                f"router/tokens_per_expert_min/layer_{use.layer} and at the router's balance "
                "(model.router.balance_coeff, expert_bias)",
                expert,
            )
        entropy = -sum(count / total * math.log(count / total) for count in tokens if count)
        least = self.settings.load_collapse
        spread = _spread(entropy, chosen, experts)
        yield _Finding(
            Place("load_collapse", "router", use.layer, None),
            spread,
            least,
            spread < least if enough else None,
            f"the router's load is spread by {spread:.3g} (0: always the same {chosen} experts, "
            f"1: evenly over {experts}), below logging.alerts.load_collapse={least:g}; look at "
            f"router/load_entropy/layer_{use.layer} and at the router's balance "
            "(model.router.balance_coeff, z_loss_coeff)",
            max(range(experts), key=tokens.__getitem__),
        )

    def _neurons(self, step: int, use: LayerUse) -> Iterator[_Finding]:
        neurons = _neurons(self.config, use.mlp)
        kept = count_kept(self.config.mone.keep_ratio_at(step), neurons)
        most, least = self.settings.dead_neurons, self.settings.load_collapse
        name = metrics_of(use.mlp)
        for expert, (tokens, dead, entropy) in enumerate(
            zip(
                use.experts["tokens"],
                use.experts["dead_neuron_share"],
                use.experts["load_entropy"],
                strict=True,
            )
        ):
            judged = tokens * kept >= ENOUGH_USES * neurons
            yield _Finding(
                Place("dead_neurons", use.mlp, use.layer, expert),
                dead,
                most,
                dead > most if judged else None,
                f"{dead:.1%} of the {neurons} neurons kept by none of {tokens:.0f} tokens, above "
                f"logging.alerts.dead_neurons={most:g}; look at "
                f"{name}/dead_neuron_share_max/layer_{use.layer} and at mone.balance.coeff",
                expert,
            )
            spread = _spread(entropy * math.log(neurons), kept, neurons)
            yield _Finding(
                Place("load_collapse", use.mlp, use.layer, expert),
                spread,
                least,
                spread < least if judged else None,
                f"the neurons' load is spread by {spread:.3g} (0: always the same {kept} neurons, "
                f"1: evenly over {neurons}), below logging.alerts.load_collapse={least:g}; look "
                f"at {name}/load_entropy_min/layer_{use.layer} and at mone.balance.coeff",
                expert,
            )

    def _shrinking(self, step: int, use: LayerUse) -> Iterator[_Finding]:
        """Yields what tells that small weights lower a loss of raw weights that is trained on."""
        balance = self.config.mone.balance
        if balance.normalize or balance.coeff == 0 or use.balance_loss is None:
            return
        by_expert = use.experts["kept_activation"]
        activation, load = _mean(by_expert), _mean(use.experts["load_balance"])
        loss = use.balance_loss
        if not all(map(math.isfinite, (activation, load, loss))):
            return
        key = (use.mlp, use.layer)
        before = self._references.get(key)
        if before is None or activation >= before.activation:
            before = _Reference(step, activation, by_expert, loss, load)
            self._references[key] = before
        fall = 1 - activation / before.activation if before.activation else 0.0
        improved = load - 1 < (1 - IMPROVED) * (before.balance - 1)
        most = self.settings.shrinking_weights
        falls = {
            expert: 1 - now / then
            for expert, (now, then) in enumerate(zip(by_expert, before.by_expert, strict=True))
            if then > 0 and not math.isnan(now)
        }
        name = metrics_of(use.mlp)
        yield _Finding(
            Place("shrinking_weights", use.mlp, use.layer, None),
            fall,
            most,
            fall > most and loss < before.loss and not improved,
            f"since step {before.step} mean |a| of kept neurons fell by {fall:.1%} (from "
            f"{before.activation:.3g} to {activation:.3g}; above "
            f"logging.alerts.shrinking_weights={most:g}) and with it the balance loss (from "
            f"{before.loss:.3g} to {loss:.3g}), but the load is no more even (load_balance from "
            f"{before.balance:.3g} to {load:.3g}); look at {name}/kept_activation and "
            f"{name}/load_balance/layer_{use.layer}, and use mone.balance.normalize=true or a "
            "smaller mone.balance.coeff",
            max(falls, key=falls.__getitem__, default=None),
        )


def _alert(step: int, finding: _Finding, expert: int | None) -> Alert:
    place = finding.place
    words = finding.words if finding.wrong else f"over, at {finding.value:.3g}"
    return Alert(
        step=step,
        event="begin" if finding.wrong else "end",
        kind=place.kind,
        part=place.part,
        layer=place.layer,
        expert=expert,
        value=finding.value,
        threshold=finding.threshold,
        message=f"{place.kind}: {_where(place, expert)}: {words}",
    )


def _where(place: Place, expert: int | None) -> str:
    if place.part in ("shared", "dense"):
        return f"layer {place.layer}, {place.part} MLP"
    if place.expert is not None:
        return f"layer {place.layer}, expert {place.expert}"
    return f"layer {place.layer}" + (f", most of all expert {expert}" if expert is not None else "")


def _neurons(config: Config, mlp: Mlp) -> int:
    """Returns f, the neurons of one expert."""
    widths: Mapping[Mlp, int] = {
        "routed": config.model.expert_ffn_hidden_size,
        "shared": config.model.shared_expert_ffn_hidden_size,
        "dense": config.model.dense_ffn_hidden_size,
    }
    return widths[mlp]


def _spread(entropy: float, chosen: int, available: int) -> float:
    """Returns where an entropy of loads lies between its least (0), when the same are chosen every
    time, and its largest (1), when all are chosen alike."""
    if chosen >= available:
        return 1.0
    return (entropy - math.log(chosen)) / (math.log(available) - math.log(chosen))


def _mean(values: tuple[float, ...]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
