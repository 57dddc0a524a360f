"""Measures plans on a model of which one decoder layer at a time is in memory.

All the text goes through a layer, once for every way in which the plans have pruned the layers up
to it, before the next layer is read; between layers the hidden states are in main memory. Plans
that begin alike share them: of those that prune one layer each, everything before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mone_megatron.analysis.sparsification.engine import Progress, Text, pruned
from mone_megatron.analysis.sparsification.layered import LayeredModel
from mone_megatron.analysis.sparsification.places import Place, places_of
from mone_megatron.analysis.sparsification.plans import Choice, Plan, dense
from mone_megatron.analysis.sparsification.statistics import LayerStatistics, Observer
from mone_megatron.evaluation.corpora import Window
from mone_megatron.evaluation.perplexity import Perplexity, measure_perplexity

# What was pruned in the layers so far.
_Prefix = tuple[Choice | None, ...]
# Hidden states of all batches.
_States = list[Tensor]
# Windows of a batch, and tokens of each.
_Shape = tuple[int, int]


@dataclass
class _Inputs:
    """What the model gives its layers.

    Attributes:
        states: to the first layer.
        arguments: beside them, by layer and shape of the batch; they do not depend on the tokens.
    """

    states: _States = field(default_factory=list)
    arguments: dict[tuple[int, _Shape], dict[str, Any]] = field(default_factory=dict)


class _Record(nn.Module):
    """In place of a layer: notes what it is given."""

    def __init__(self, number: int, inputs: _Inputs) -> None:
        super().__init__()
        self._number, self._inputs = number, inputs

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        """Give back ``hidden_states``."""
        if self._number == 0:
            self._inputs.states.append(hidden_states.cpu())
        self._inputs.arguments.setdefault((self._number, _shape(hidden_states)), arguments)
        return hidden_states


class _Give(nn.Module):
    """In place of the layers: gives what they have computed, batch by batch."""

    def __init__(self, states: _States) -> None:
        super().__init__()
        self._states = iter(states)

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        """The next batch's states, where ``hidden_states`` are."""
        return next(self._states).to(hidden_states.device)


class _Pass(nn.Module):
    """In place of a layer: nothing."""

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        """Give back ``hidden_states``."""
        return hidden_states


class StreamedEngine:
    """See :class:`.engine.Engine`."""

    def __init__(
        self, layered: LayeredModel, targets: Sequence[str], *, seed: int, memory_bytes: int
    ) -> None:
        """Find the places.

        Args:
            layered: opened.
            targets: from :func:`.places.choose_targets`.
            seed: of random scores.
            memory_bytes: hidden states to hold at once, about; plans that need more are measured
                in several passes over the weights.
        """
        self._layered = layered
        self._targets = tuple(targets)
        self.layers: list[list[Place]] = [places_of(layer, targets) for layer in layered.layers]
        self._seed = seed
        self._memory_bytes = memory_bytes

    def work(self, plans: Sequence[Plan], text: Text) -> int:
        """Tokens through one layer."""
        groups = self._groups(plans, text)
        return text.tokens * sum(
            len({plan_prefix(plan, number + 1) for plan in group})
            for group in groups
            for number in range(len(self.layers))
        )

    def measure(
        self, plans: Sequence[Plan], text: Text, progress: Progress
    ) -> Iterator[tuple[Plan, Perplexity]]:
        """See :class:`.engine.Engine`: plans are known in groups, when their pass has ended."""
        for group in self._groups(plans, text):
            states = self._pass(group, text, progress, {})
            for plan in group:
                final = states[plan_prefix(plan, len(self.layers))]
                yield plan, self._perplexity(final, text)

    def observe(
        self, text: Text, tops: Sequence[float], progress: Progress
    ) -> list[LayerStatistics]:
        """See :class:`.engine.Engine`."""
        observers = {
            (number, index): Observer(number, place.target, place.neurons, self._layered.device)
            for number, places in enumerate(self.layers)
            for index, place in enumerate(places)
            if place.defines_activation
        }
        self._pass([dense(len(self.layers))], text, progress, observers)
        tokens = text.tokens
        return [observer.statistics(tops, tokens) for observer in observers.values()]

    def _groups(self, plans: Sequence[Plan], text: Text) -> list[list[Plan]]:
        width = self._layered.model.config.get_text_config().hidden_size
        # The states of one plan, and beside them those that its pass began with.
        size = text.tokens * width * self._layered.model.dtype.itemsize
        room = max(1, self._memory_bytes // size - 1)
        return [list(plans[start : start + room]) for start in range(0, len(plans), room)]

    def _pass(
        self,
        plans: Sequence[Plan],
        text: Text,
        progress: Progress,
        observers: dict[tuple[int, int], Observer],
    ) -> dict[_Prefix, _States]:
        """The last layer's output under each plan, by its whole prefix."""
        inputs = self._inputs(text)
        states: dict[_Prefix, _States] = {(): inputs.states}
        for number in range(len(self.layers)):
            with self._layered.layer(number) as layer:
                # Places hold on to modules, whose weights are there only now.
                places = places_of(layer, self._targets)
                ways = list(dict.fromkeys(plan_prefix(plan, number + 1) for plan in plans))
                after: dict[_Prefix, _States] = {}
                for position, way in enumerate(ways):
                    needed = any(way[:-1] == later[:-1] for later in ways[position + 1 :])
                    before = states[way[:-1]] if needed else states.pop(way[:-1])
                    with ExitStack() as stack:
                        stack.enter_context(pruned(places, way[-1], layer=number, seed=self._seed))
                        for index, place in enumerate(places):
                            if (number, index) in observers:
                                stack.enter_context(place.attached(observers[number, index]))
                        after[way] = self._through(layer, number, before, inputs, text, progress)
                states = after
        return states

    @torch.no_grad()
    def _inputs(self, text: Text) -> _Inputs:
        inputs = _Inputs()
        recorders = [_Record(number, inputs) for number in range(len(self.layers))]
        with self._layered.standing_in(recorders):
            for batch in text.batches():
                tokens_BS = torch.from_numpy(np.stack(batch))[:, :-1].to(self._layered.device)
                self._layered.decoder(input_ids=tokens_BS, use_cache=False)
        return inputs

    @torch.no_grad()
    def _through(
        self,
        layer: nn.Module,
        number: int,
        before: _States,
        inputs: _Inputs,
        text: Text,
        progress: Progress,
    ) -> _States:
        after: _States = []
        for states, batch in zip(before, text.batches(), strict=True):
            arguments = inputs.arguments[number, _shape(states)]
            after.append(layer(states.to(self._layered.device), **arguments).cpu())
            progress(_predicted(batch))
        return after

    def _perplexity(self, states: _States, text: Text) -> Perplexity:
        rest = [_Pass() for _ in self.layers[1:]]
        with self._layered.standing_in([_Give(states), *rest]):
            return measure_perplexity(
                self._layered.model,
                text.windows,
                bytes_of_token=text.bytes_of_token,
                batch_size=text.batch_size,
                max_tokens=text.max_tokens,
            )


def plan_prefix(plan: Plan, layers: int) -> _Prefix:
    """What a plan prunes in the first ``layers`` layers."""
    return tuple(plan.at(number) for number in range(layers))


def _shape(hidden_states: Tensor) -> _Shape:
    windows, tokens = hidden_states.shape[:2]
    return windows, tokens


def _predicted(batch: Sequence[Window]) -> int:
    return sum(window.size - 1 for window in batch)
