"""Measures plans on a model that is in memory whole, by its own forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from transformers import PreTrainedModel

from mone_megatron.evaluation.evaluate import harness_model
from mone_megatron.evaluation.harness import Score, run_tasks
from mone_megatron.evaluation.perplexity import Perplexity, measure_perplexity
from mone_megatron.lab.sparsification.asking import Questions
from mone_megatron.lab.sparsification.engine import Progress, Text, pruned
from mone_megatron.lab.sparsification.places import Place, decoder_layers, places_of
from mone_megatron.lab.sparsification.plans import Plan
from mone_megatron.lab.sparsification.statistics import LayerStatistics, Observer


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
    def pruning(self, plan: Plan) -> Iterator[None]:
        """Makes the model follow a plan while the context lasts."""
        with ExitStack() as stack:
            for number, places in enumerate(self.layers):
                choice = plan.at(number)
                stack.enter_context(pruned(places, choice, layer=number, seed=self._seed))
            yield

    def work(self, plans: Sequence[Plan], text: Text) -> int:
        """Returns how many tokens go through the model."""
        return len(plans) * text.tokens

    def measure(
        self, plans: Sequence[Plan], text: Text, progress: Progress
    ) -> Iterator[tuple[Plan, Perplexity]]:
        """Yields each plan with the text's perplexity under it; see :class:`.engine.Engine`."""
        for plan in plans:
            with self.pruning(plan):
                found = self._perplexity(text, progress)
            yield plan, found

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
        observers: list[Observer] = []
        with ExitStack() as stack:
            for number, places in enumerate(self.layers):
                for place in places:
                    if place.defines_activation:
                        observers.append(
                            Observer(number, place.target, place.neurons, self.model.device)
                        )
                        stack.enter_context(place.attached(observers[-1]))
            found = self._perplexity(text, progress)
        return [observer.statistics(tops, found.tokens) for observer in observers]

    def _perplexity(self, text: Text, progress: Progress) -> Perplexity:
        return measure_perplexity(
            self.model,
            text.windows,
            bytes_of_token=text.bytes_of_token,
            batch_size=text.batch_size,
            max_tokens=text.max_tokens,
            progress=progress,
        )
