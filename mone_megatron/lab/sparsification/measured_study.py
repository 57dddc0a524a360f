"""Measures everything that is asked about one model, or takes it from the results file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from mone_megatron.evaluation.estimates import Difference, difference
from mone_megatron.evaluation.evaluate import perplexity_scores
from mone_megatron.evaluation.harness import Score
from mone_megatron.evaluation.models import ModelFacts, load
from mone_megatron.evaluation.tasks import LoadedTasks
from mone_megatron.lab.sparsification.asking import Questions, refuse_writing
from mone_megatron.lab.sparsification.budget import Allotment, path, search
from mone_megatron.lab.sparsification.calibration import Calibration, check_length
from mone_megatron.lab.sparsification.engine import Engine, Text
from mone_megatron.lab.sparsification.findings import (
    BudgetResult,
    BudgetSettings,
    Kind,
    Layer,
    Point,
    Removal,
    Study,
    Truncation,
)
from mone_megatron.lab.sparsification.granularity import Remover, check_removals, removal_of
from mone_megatron.lab.sparsification.identity import identity_of
from mone_megatron.lab.sparsification.kept_results import (
    Results,
    score_from_json,
    score_to_json,
)
from mone_megatron.lab.sparsification.layered import model_without_weights, open_layered
from mone_megatron.lab.sparsification.places import (
    check_definable,
    choose_targets,
    compute_all_neurons,
    decoder_layers,
    places_of,
)
from mone_megatron.lab.sparsification.plans import (
    LAYER,
    RANK,
    THRESHOLD,
    Plan,
    activated,
    dense,
    kept_neurons,
    plan,
    projections_before,
    uniform,
)
from mone_megatron.lab.sparsification.progress import WorkProgress
from mone_megatron.lab.sparsification.resident import ResidentEngine
from mone_megatron.lab.sparsification.statistics import LayerStatistics
from mone_megatron.lab.sparsification.streaming import StreamedEngine
from mone_megatron.lab.sparsification.truncation import Truncator
from mone_megatron.lab.sparsification.use import Use, tallies_json

Say = Callable[[str], None]


@dataclass(frozen=True)
class StudySettings:
    """Holds what to measure of every model, and how.

    Attributes:
        scores: scores to rank neurons by.
        shares: shares to prune, each in every layer.
        tops: shares of the largest activations to give thresholds for.
        targets: kinds of neurons to prune; None for the routed experts, or the dense MLPs of a
            model that has none.
        all_neurons: a model that selects neurons computes all of them.
        seed: of random scores.
        batch_size: windows or questions at once.
        limit: questions of each task; None for all.
        budget: None for none.
        dtype: of the weights; None for the model's own.
        device: as torch names it.
        stream: hold one decoder layer at a time.
        stream_bytes: size of the hidden states held between layers, about.
        trust_remote_code: whether a model may bring code of its own.
        rules: how scores decide.
        threshold_of: whether a threshold is of a layer or of each expert.
        least_calibration: tokens that the calibration text must have.
        cetts: cumulative errors of tail truncation to truncate at.
        rises: rises of the perplexity, in percent, to truncate up to.
        removals: ways to remove experts or neurons, at the same shares.
    """

    scores: tuple[str, ...]
    shares: tuple[float, ...]
    tops: tuple[float, ...]
    targets: tuple[str, ...] | None
    all_neurons: bool
    seed: int
    batch_size: int
    limit: int | None
    budget: BudgetSettings | None
    dtype: torch.dtype | None
    device: str
    stream: bool
    stream_bytes: int
    trust_remote_code: bool
    rules: tuple[str, ...] = (RANK,)
    threshold_of: str = LAYER
    least_calibration: int = 0
    cetts: tuple[float, ...] = ()
    rises: tuple[float, ...] = ()
    removals: tuple[str, ...] = ()


@dataclass(frozen=True)
class Subject:
    """Holds a model to study, and what to read to it.

    Attributes:
        label: what to call it.
        facts: known of it before its weights are.
        text: text to measure on.
        calibration: text to choose shares for layers and thresholds on; the same object as
            ``text`` when it is.
        tasks: None for none.
    """

    label: str
    facts: ModelFacts
    text: Text
    calibration: Text
    tasks: LoadedTasks | None


class _Lazy:
    """Opens the engine of one model, and so reads its weights, when something is first measured."""

    def __init__(self, open_: Callable[[], Engine]) -> None:
        self._open = open_
        self._engine: Engine | None = None

    def __call__(self) -> Engine:
        if self._engine is None:
            self._engine = self._open()
        return self._engine


class ModelStudy:
    """Measures one model, by :meth:`run`; :func:`look_into` makes it."""

    def __init__(
        self,
        subject: Subject,
        settings: StudySettings,
        model: PreTrainedModel,
        targets: tuple[str, ...],
    ) -> None:
        self._subject, self._settings, self._targets = subject, settings, targets
        self._layers = tuple(layers_of(model, targets))
        self._count = len(self._layers)
        # Without |a| there are no statistics of it.
        self._observable = any(
            place.defines_activation
            for layer in decoder_layers(model)
            for place in places_of(layer, targets)
        )
        # Projections that the model's own selection reads of every neuron.
        self._own_before = max(
            projections_before(place.own.score)
            if place.own is not None and place.own_kept < place.neurons
            else 0
            for layer in decoder_layers(model)
            for place in places_of(layer, targets)
        )

    def identity(self) -> dict[str, Any]:
        """Returns what tells this model and its text from others, for the results file."""
        return {
            "weights": identity_of(self._subject.facts.where),
            "text": self._subject.text.fingerprint,
            "targets": list(self._targets),
        }

    def run(self, results: Results, say: Say) -> Study:
        """Measures everything that is not in ``results`` yet.

        Raises:
            ValueError: the weights cannot be read, or what they compute is not finite.
        """
        key, identity = {"model": self._subject.label}, self.identity()
        if results.get(key) is not None:
            results.same_or_add(key, identity, "models or text")
        with ExitStack() as stack:

            def opened() -> Engine:
                engine = stack.enter_context(self._open(say))
                # Not before: what could not be read may be put right and tried again.
                results.same_or_add(key, identity, "models or text")
                return engine

            return self._study(_Lazy(opened), results, say)

    def _study(self, engine: _Lazy, results: Results, say: Say) -> Study:
        settings, subject = self._settings, self._subject
        lines = self._lines(engine, results)
        nothing = dense(self._count)
        plans = [nothing, *(line.plan for line in lines)]
        found = self._on_text(plans, subject.text, engine, results)
        loss = found[nothing][0].estimate.value
        if not math.isfinite(loss):
            raise ValueError(
                f"{subject.label}: the loss with nothing pruned is {loss}: its weights are "
                "damaged, or --dtype is too narrow for it"
            )
        if subject.tasks is not None:
            by_task = self._on_tasks(plans, subject.tasks, engine, results)
            found = {each: (*by_task[each], *found[each]) for each in found}
        base = found[nothing]
        points = [
            self._point(line, self._use(line.plan, results), found[line.plan], base)
            for line in lines
        ]
        budget = None
        statistics = self._statistics(engine, results, say)
        if settings.budget is not None:
            budget = self._budget(settings.budget, engine, results, say)
        return Study(
            label=subject.label,
            where=subject.facts.where,
            targets=self._targets,
            layers=self._layers,
            tokens=subject.text.tokens,
            dense=self._point(
                _Line(nothing, nothing.score, 0.0), self._use(nothing, results), base, base
            ),
            points=tuple(points),
            statistics=statistics,
            budget=budget,
            beginning=subject.facts.beginning,
            truncations=self._truncations(engine, results),
            removals=self._removals(engine, results, say),
        )

    def _lines(self, engine: _Lazy, results: Results) -> list[_Line]:
        """Returns the plans of the curves, in the order in which they are shown."""
        settings = self._settings
        lines: list[_Line] = []
        for rule in settings.rules:
            if rule == RANK:
                lines += [
                    _Line(uniform(score, share, self._count), score, share)
                    for score in settings.scores
                    for share in settings.shares
                ]
                continue
            assert rule == THRESHOLD, rule
            calibration = self._calibration(engine, results)
            cut = calibration.threshold_plans(
                settings.scores, settings.shares, settings.threshold_of
            )
            lines += [_Line(each, score, share, rule) for (score, share), each in cut.items()]
        return lines

    def _truncations(self, engine: _Lazy, results: Results) -> tuple[Truncation, ...]:
        settings = self._settings
        if not settings.cetts and not settings.rises:
            return ()
        truncator = Truncator(
            self._calibration(engine, results),
            self._subject.text,
            lambda plans, text: self._on_text(plans, text, engine, results),
            lambda each: self._use(each, results),
        )
        return truncator.truncations(settings.cetts, settings.rises)

    def _removals(self, engine: _Lazy, results: Results, say: Say) -> tuple[Removal, ...]:
        settings, text = self._settings, self._subject.text
        if not settings.removals:
            return ()
        remover = Remover(self._calibration(engine, results), settings.seed, say)
        plans = remover.plans(settings.removals, settings.shares)
        nothing = dense(self._count)
        found = self._on_text([nothing, *(each.plan for each in plans)], text, engine, results)
        return tuple(
            removal_of(each, self._use(each.plan, results), found[each.plan], found[nothing])
            for each in plans
        )

    def _calibration(self, engine: _Lazy, results: Results) -> Calibration:
        subject = self._subject
        return Calibration(subject.label, subject.calibration, self._layers, engine, results)

    @contextmanager
    def _open(self, say: Say) -> Iterator[Engine]:
        settings, facts = self._settings, self._subject.facts
        say(f"{self._subject.label}: reading {facts.where}")
        if settings.stream:
            with open_layered(
                facts.where, dtype=settings.dtype, device=settings.device, say=say
            ) as layered:
                if settings.all_neurons:
                    compute_all_neurons(layered.model)
                yield StreamedEngine(
                    layered, self._targets, seed=settings.seed, memory_bytes=settings.stream_bytes
                )
            return
        model = load(
            facts,
            dtype=settings.dtype,
            device=settings.device,
            trust_remote_code=settings.trust_remote_code,
        ).model
        if settings.all_neurons:
            compute_all_neurons(model)
        yield ResidentEngine(model, self._targets, seed=settings.seed)

    def _on_text(
        self, plans: Sequence[Plan], text: Text, engine: _Lazy, results: Results
    ) -> dict[Plan, tuple[Score, ...]]:
        """Returns loss, perplexity and bits per byte under every plan, measured unless kept."""

        def key(each: Plan) -> dict[str, Any]:
            return self._text_key(each, text)

        todo = [each for each in dict.fromkeys(plans) if results.get(key(each)) is None]
        if todo:
            ready = engine()
            title = f"{self._subject.label}: loss under {len(todo)} prunings"
            if len(todo) == 1:
                title = f"{self._subject.label}: loss under one pruning"
            with WorkProgress(title, ready.work(todo, text)) as progress:
                for each, measured in ready.measure(todo, text, progress.add):
                    scores = perplexity_scores(text.name, measured.perplexity)
                    value: dict[str, Any] = {"scores": [score_to_json(one) for one in scores]}
                    if each.made is not None:
                        value["computed"] = tallies_json(measured.tallies)
                    results.add(key(each), value)
        return {each: _scores(results, key(each)) for each in plans}

    def _on_tasks(
        self, plans: Sequence[Plan], tasks: LoadedTasks, engine: _Lazy, results: Results
    ) -> dict[Plan, tuple[Score, ...]]:
        def key(each: Plan) -> dict[str, Any]:
            return self._key(each) | {"tasks": list(tasks.tasks)}

        todo = [each for each in dict.fromkeys(plans) if results.get(key(each)) is None]
        if todo:
            settings, facts = self._settings, self._subject.facts
            questions = Questions(tasks, facts, settings.limit, settings.batch_size)
            ready = engine()
            title = f"{self._subject.label}: tasks"
            with WorkProgress(title, len(todo) * self._count, unit="layers") as progress:
                for each, scores in ready.ask(todo, questions, progress.add):
                    results.add(key(each), {"scores": [score_to_json(one) for one in scores]})
        return {each: _scores(results, key(each)) for each in plans}

    def _statistics(self, engine: _Lazy, results: Results, say: Say) -> tuple[LayerStatistics, ...]:
        if not self._observable:
            say(f"{self._subject.label}: its experts do not define |a|, so no thresholds of it")
            return ()
        text, tops = self._subject.text, self._settings.tops
        key = {"model": self._subject.label, "statistics": list(tops)}
        if results.get(key) is None:
            ready = engine()
            title = f"{self._subject.label}: activations"
            with WorkProgress(title, ready.work([dense(self._count)], text)) as progress:
                layers = ready.observe(text, tops, progress.add)
            results.add(key, {"layers": [layer.to_json() for layer in layers]})
        return results.read(
            key, lambda kept: tuple(LayerStatistics.from_json(one) for one in kept["layers"])
        )

    def _budget(
        self, settings: BudgetSettings, engine: _Lazy, results: Results, say: Say
    ) -> BudgetResult:
        text = self._subject.calibration
        layers = [layer for layer in self._layers if layer.weight]

        def whole(shares: Sequence[float]) -> Plan:
            """Returns a plan of all layers from shares of those that have something to prune."""
            by_layer = dict(zip((layer.number for layer in layers), shares, strict=True))
            return plan(settings.score, [by_layer.get(layer.number, 0.0) for layer in self._layers])

        def alone(position: int, share: float) -> Plan:
            return whole([share if other == position else 0.0 for other in range(len(layers))])

        nothing = dense(self._count)
        ones = [[alone(at, share) for share in settings.shares] for at in range(len(layers))]
        plans = [nothing, *(each for row in ones for each in row)]
        say(f"{self._subject.label}: sensitivity of {len(layers)} layers")
        found = self._on_text(plans, text, engine, results)

        def change(each: Plan, on: Text = text) -> Difference:
            measured = self._on_text([nothing, each], on, engine, results)
            return _changes(measured[each], measured[nothing])[0]

        sensitivity = [
            [_changes(found[each], found[nothing])[0].value for each in row] for row in ones
        ]
        allotments = path(sensitivity, settings.shares, [layer.weight for layer in layers])

        def measure(allotment: Allotment) -> float:
            return change(whole(allotment.shares)).value

        best, probes = search(allotments, settings.rise, measure)
        chosen = whole(best.allotment.shares)
        other = None
        if self._subject.text is not text:
            other = change(chosen, self._subject.text)
        return BudgetResult(
            settings=settings,
            layers=tuple(layer.number for layer in layers),
            loss=found[nothing][0].estimate.value,
            sensitivity=tuple(tuple(row) for row in sensitivity),
            best=best,
            best_change=change(chosen),
            probes=tuple(probes),
            uniform_change=change(whole([best.allotment.pruned] * len(layers))),
            elsewhere=other,
        )

    def _key(self, each: Plan) -> dict[str, Any]:
        return {"model": self._subject.label} | each.key()

    def _text_key(self, each: Plan, text: Text) -> dict[str, Any]:
        return self._key(each) | {"text": text.fingerprint}

    def _use(self, each: Plan, results: Results) -> Use:
        """Returns what a token computes under a plan: of ranks by arithmetic, else as measured."""
        before = max(self._own_before, _before(each))
        if each.made is not None:
            key = self._text_key(each, self._subject.text)
            return results.read(key, lambda kept: Use.of(kept["computed"], before))
        weight = sum(layer.weight for layer in self._layers)
        stays = 0.0
        for layer in self._layers:
            for kind in layer.kinds:
                kept = kept_neurons(each.shares[layer.number], kind.neurons)
                stays += min(kept, kind.own_kept) * kind.uses
        return Use((weight - stays) / weight, activated(before, 1.0, stays / weight))

    def _point(
        self, line: _Line, use: Use, scores: tuple[Score, ...], base: tuple[Score, ...]
    ) -> Point:
        changes = _changes(scores, base)
        return Point(line.score, line.share, use.pruned, scores, changes, line.rule, use.activated)


@dataclass(frozen=True)
class _Line:
    """Holds a plan, and what is shown of it."""

    plan: Plan
    score: str
    share: float
    rule: str = RANK


def look_into(subject: Subject, settings: StudySettings) -> ModelStudy:
    """Checks a model before its weights are read, and returns its study.

    Raises:
        ValueError: it has nothing of what is to be pruned, a score is not defined for it, or a task
            cannot be asked of a model that is streamed; one line.
    """
    where = subject.facts.where
    if settings.stream and not Path(where).is_dir():
        raise ValueError(f"--stream: {where} is no folder; download the model first")
    if settings.stream and subject.tasks is not None:
        refuse_writing(subject.tasks)
    check_length(subject.calibration, settings.least_calibration)
    model = model_without_weights(where, trust_remote_code=settings.trust_remote_code)
    if settings.all_neurons:
        compute_all_neurons(model)
    try:
        targets = choose_targets(model, settings.targets)
        places = [place for layer in decoder_layers(model) for place in places_of(layer, targets)]
        scores = {*settings.scores} | ({settings.budget.score} if settings.budget else set())
        check_definable(places, sorted(scores))
        check_removals(settings.removals, "routed" in targets, type(model).__name__)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return ModelStudy(subject, settings, model, targets)


def layers_of(model: PreTrainedModel, targets: Sequence[str]) -> Iterator[Layer]:
    """Yields what each decoder layer has of some kinds of places."""
    config = model.config.get_text_config()
    for number, layer in enumerate(decoder_layers(model)):
        yield Layer(
            number,
            tuple(
                Kind(
                    place.target,
                    place.neurons,
                    place.own_kept,
                    int(config.num_experts_per_tok) if place.target == "routed" else 1,
                    place.experts,
                )
                for place in places_of(layer, targets)
            ),
        )


def _changes(scores: Sequence[Score], base: Sequence[Score]) -> tuple[Difference, ...]:
    return tuple(
        difference(one.estimate, other.estimate, same_samples=one.samples == other.samples)
        for one, other in zip(scores, base, strict=True)
    )


def _before(each: Plan) -> int:
    """Returns how many projections a plan's score reads of every neuron."""
    return projections_before(each.score) if each.made is not None or any(each.shares) else 0


def _scores(results: Results, key: dict[str, Any]) -> tuple[Score, ...]:
    return results.read(key, lambda kept: tuple(score_from_json(one) for one in kept["scores"]))
