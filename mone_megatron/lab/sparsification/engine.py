"""Describes what measures plans: an engine holds a model and prunes its neurons, plan by plan."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from mone_megatron.evaluation.corpora import Window
from mone_megatron.evaluation.harness import Score
from mone_megatron.evaluation.perplexity import Perplexity, batches
from mone_megatron.lab.sparsification.asking import Questions
from mone_megatron.lab.sparsification.places import ExpertsPlace, Place
from mone_megatron.lab.sparsification.plans import (
    Choice,
    Cut,
    ExpertsGone,
    ExpertsSkipped,
    LayerChoice,
    NeuronsGone,
    Plan,
)
from mone_megatron.lab.sparsification.ranking import (
    Choose,
    Counted,
    Cutter,
    ExpertKeeper,
    NeuronKeeper,
    Pruner,
    Tally,
    keep_all,
)
from mone_megatron.lab.sparsification.removal import SetErrors, skipping
from mone_megatron.lab.sparsification.statistics import LayerStatistics, Observer

# Told of the work that was done, in the units of ``Engine.work``.
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Text:
    """Holds the windows of tokens to measure on.

    Attributes:
        name: of the corpus.
        windows: each ``[L + 1]`` int64.
        bytes_of_token: ``[V]``, or None where the tokenizer's spelling is not known.
        batch_size: windows at once.
        max_tokens: stop after the window with which so many are predicted; None for all.
    """

    name: str
    windows: Sequence[Window]
    bytes_of_token: npt.NDArray[np.int64] | None
    batch_size: int
    max_tokens: int | None

    def batches(self) -> Iterator[list[Window]]:
        """Yields the batches of windows in the order in which every engine reads them."""
        return batches(self.windows, self.batch_size, self.max_tokens)

    @cached_property
    def tokens(self) -> int:
        """Returns how many tokens are predicted."""
        return sum(window.size - 1 for batch in self.batches() for window in batch)

    @cached_property
    def fingerprint(self) -> str:
        """Returns the SHA-256 of the windows that are read, in hex."""
        digest = hashlib.sha256()
        for batch in self.batches():
            for window in batch:
                digest.update(window.size.to_bytes(8, "little") + window.tobytes())
        return digest.hexdigest()


# What each place of each layer computed; nothing of layers that a plan leaves alone.
Tallies = tuple[tuple[Tally, ...], ...]
# What looks at rows and keeps all neurons, by layer and index of the place.
Watcher = Choose | SetErrors
Watchers = Mapping[tuple[int, int], Watcher]


@dataclass(frozen=True)
class Measured:
    """Holds a text's perplexity under a plan, and what the plan's places computed."""

    perplexity: Perplexity
    tallies: Tallies


class Engine(Protocol):
    """Describes a model whose neurons can be pruned."""

    @property
    def layers(self) -> Sequence[Sequence[Place]]:
        """Returns the places of each decoder layer; none where a layer has nothing to prune."""

    def work(self, plans: Sequence[Plan], text: Text) -> int:
        """Returns the work of measuring plans, in tokens through a model or through a layer."""

    def measure(
        self, plans: Sequence[Plan], text: Text, progress: Progress
    ) -> Iterator[tuple[Plan, Measured]]:
        """Yields each plan with what it did to the text, as soon as that is known."""

    def ask(
        self, plans: Sequence[Plan], questions: Questions, progress: Progress
    ) -> Iterator[tuple[Plan, list[Score]]]:
        """Yields each plan with the tasks' scores; progress counts the layers of every plan."""

    def observe(
        self, text: Text, tops: Sequence[float], progress: Progress
    ) -> list[LayerStatistics]:
        """Returns the statistics of the unpruned activations, where |a| is defined.

        It is the work of one plan.
        """

    def watch(self, watchers: Watchers, text: Text, progress: Progress) -> None:
        """Shows the rows of the unpruned model to ``watchers``, each at its place.

        It is the work of one plan.
        """


def observers_of(
    layers: Sequence[Sequence[Place]], device: torch.device
) -> dict[tuple[int, int], Observer]:
    """Returns what counts the activations of every place that defines them."""
    return {
        (number, index): Observer(number, place.target, place.neurons, device)
        for number, places in enumerate(layers)
        for index, place in enumerate(places)
        if place.defines_activation
    }


@contextmanager
def pruned(
    places: Sequence[Place], choice: LayerChoice | None, *, layer: int, seed: int
) -> Iterator[list[Tally]]:
    """Prunes one layer's places while the context lasts; None leaves them alone.

    Every place draws its random scores from a stream that depends on the seed and its position
    only, so that however a model is run, the same neurons go.

    Yields:
        A list that holds, when the context has ended, what was computed at each place; nothing when
        they are left alone.
    """
    tallies: list[Tally] = []
    counters: list[Counted] = []
    with ExitStack() as stack:
        for index, place in enumerate(places if choice is not None else ()):
            assert choice is not None
            own_seed = int(np.random.SeedSequence([seed, layer, index]).generate_state(1)[0])
            counters.append(Counted(_chooser(choice, place, index, own_seed), place.neurons))
            if isinstance(choice, ExpertsGone) and isinstance(place, ExpertsPlace):
                stack.enter_context(place.without(choice.experts))
            if isinstance(choice, ExpertsSkipped) and isinstance(place, ExpertsPlace):
                weigh = partial(skipping, beta=choice.beta)
                stack.enter_context(place.attached(counters[-1], weigh))
            else:
                stack.enter_context(place.attached(counters[-1]))
        yield tallies
        tallies += [counter.tally for counter in counters]


def _chooser(choice: LayerChoice, place: Place, index: int, seed: int) -> Choose:
    """Returns what a layer's choice does at its place of an index."""
    match choice:
        case Choice():
            return Pruner(choice, seed=seed)
        case Cut():
            return Cutter(choice.score, choice.thresholds[index])
        case NeuronsGone():
            return NeuronKeeper(choice.kept[index], place.experts, place.neurons)
        case ExpertsGone():
            return ExpertKeeper(choice.experts) if place.target == "routed" else keep_all
        case ExpertsSkipped():
            return keep_all
        case _:
            raise AssertionError(f"{choice!r} is no choice")


@contextmanager
def watching(place: Place, watcher: Watcher) -> Iterator[None]:
    """Shows a place to a watcher while the context lasts."""
    if isinstance(watcher, SetErrors):
        assert isinstance(place, ExpertsPlace), "only experts can be gone"
        with watcher.watching(place):
            yield
    else:
        with place.attached(watcher):
            yield
