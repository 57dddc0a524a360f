"""Describes what measures plans: an engine holds a model and prunes its neurons, plan by plan."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mone_megatron.evaluation.corpora import Window
from mone_megatron.evaluation.harness import Score
from mone_megatron.evaluation.perplexity import Perplexity, batches
from mone_megatron.lab.sparsification.asking import Questions
from mone_megatron.lab.sparsification.places import Place
from mone_megatron.lab.sparsification.plans import Choice, Plan
from mone_megatron.lab.sparsification.ranking import Pruner
from mone_megatron.lab.sparsification.statistics import LayerStatistics

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


class Engine(Protocol):
    """Describes a model whose neurons can be pruned."""

    @property
    def layers(self) -> Sequence[Sequence[Place]]:
        """Returns the places of each decoder layer; none where a layer has nothing to prune."""

    def work(self, plans: Sequence[Plan], text: Text) -> int:
        """Returns the work of measuring plans, in tokens through a model or through a layer."""

    def measure(
        self, plans: Sequence[Plan], text: Text, progress: Progress
    ) -> Iterator[tuple[Plan, Perplexity]]:
        """Yields each plan with the text's perplexity under it, as soon as that is known."""

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


@contextmanager
def pruned(
    places: Sequence[Place], choice: Choice | None, *, layer: int, seed: int
) -> Iterator[None]:
    """Prunes one layer's places while the context lasts; None leaves them alone.

    Every place draws its random scores from a stream that depends on the seed and its position
    only, so that however a model is run, the same neurons go.
    """
    with ExitStack() as stack:
        for index, place in enumerate(places if choice is not None else ()):
            assert choice is not None
            own_seed = int(np.random.SeedSequence([seed, layer, index]).generate_state(1)[0])
            stack.enter_context(place.attached(Pruner(choice, seed=own_seed)))
        yield
