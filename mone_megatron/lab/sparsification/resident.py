"""Measures plans on a model that is in memory whole, by its own forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from transformers import PreTrainedModel

from mone_megatron.evaluation.evaluate import harness_model
from mone_megatron.evaluation.harness import Score, run_tasks
from mone_megatron.evaluation.perplexity import Perplexity, measure_perplexity
from mone_megatron.lab.sparsification.asking import Questions
from mone_megatron.lab.sparsification.engine import (
    Measured,
    Progress,
    Text,
    Watchers,
    observers_of,
    pruned,
    watching,
)
from mone_megatron.lab.sparsification.places import Place, decoder_layers, places_of
from mone_megatron.lab.sparsification.plans import Plan
from mone_megatron.lab.sparsification.ranking import Tally
from mone_megatron.lab.sparsification.statistics import LayerStatistics


class ResidentEngine:
    """Is an :class:`.engine.Engine` whose model is in memory whole.

    A plan that prunes nothing is the model, untouched.
    """

    def __init__(self, model: PreTrainedModel, targets: Sequence[str], *, seed: int) -> None:
        """Finds the places.

        Args:
            model: in evaluation mode.
            targets: from :func:`.places.choose_targets`.
            seed: of random scores.
        """
        self.model = model
        self.layers: list[list[Place]] = [
            places_of(layer, targets) for layer in decoder_layers(model)
        ]
        self._seed = seed

    @contextmanager
    def pruning(self, plan: Plan) -> Iterator[list[list[Tally]]]:
        """Makes the model follow a plan while the context lasts; see :func:`.engine.pruned`."""
        with ExitStack() as stack:
            yield [
                stack.enter_context(pruned(places, plan.at(number), layer=number, seed=self._seed))
                for number, places in enumerate(self.layers)
            ]

    def work(self, plans: Sequence[Plan], text: Text) -> int:
        """Returns how many tokens go through the model."""
        return len(plans) * text.tokens

    def measure(
        self, plans: Sequence[Plan], text: Text, progress: Progress
    ) -> Iterator[tuple[Plan, Measured]]:
        """Yields each plan with what it did to the text; see :class:`.engine.Engine`."""
        for plan in plans:
            with self.pruning(plan) as tallies:
                found = self._perplexity(text, progress)
            yield plan, Measured(found, tuple(map(tuple, tallies)))

    def ask(
        self, plans: Sequence[Plan], questions: Questions, progress: Progress
    ) -> Iterator[tuple[Plan, list[Score]]]:
        """Yields each plan with the tasks' scores; see :class:`.engine.Engine`."""
        lm = harness_model(self.model, questions.facts, batch_size=questions.batch_size, quiet=True)
        for plan in plans:
            with self.pruning(plan):
                scores = run_tasks(lm, questions.tasks, limit=questions.limit)
            progress(len(self.layers))
            yield plan, scores

    def observe(
        self, text: Text, tops: Sequence[float], progress: Progress
    ) -> list[LayerStatistics]:
        """Returns the activations' statistics, unpruned; see :class:`.engine.Engine`."""
        observers = observers_of(self.layers, self.model.device)
        self.watch(observers, text, progress)
        return [observer.statistics(tops, text.tokens) for observer in observers.values()]

    def watch(self, watchers: Watchers, text: Text, progress: Progress) -> None:
        """Shows the unpruned model's rows to ``watchers``; see :class:`.engine.Engine`."""
        with ExitStack() as stack:
            for (number, index), watcher in watchers.items():
                stack.enter_context(watching(self.layers[number][index], watcher))
            self._perplexity(text, progress)

    def _perplexity(self, text: Text, progress: Progress) -> Perplexity:
        return measure_perplexity(
            self.model,
            text.windows,
            bytes_of_token=text.bytes_of_token,
            batch_size=text.batch_size,
            max_tokens=text.max_tokens,
            progress=progress,
        )
