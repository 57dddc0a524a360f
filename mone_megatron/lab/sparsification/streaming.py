"""Measures plans on a model of which one decoder layer at a time is in memory.

All the text goes through a layer, once for every way in which the plans have pruned the layers up
to it, before the next layer is read; between layers the hidden states are in main memory. Plans
that begin alike share them: of those that prune one layer each, everything before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mone_megatron.evaluation.harness import Score, run_tasks
from mone_megatron.evaluation.perplexity import Perplexity, measure_perplexity
from mone_megatron.evaluation.requests import ScoreRequest
from mone_megatron.evaluation.scored_lm import ScoredLM
from mone_megatron.lab.sparsification.asking import (
    Answers,
    Listener,
    Questions,
    Replay,
    RequestBatch,
    answer,
    batch_requests,
)
from mone_megatron.lab.sparsification.engine import (
    Measured,
    Progress,
    Text,
    Watchers,
    observers_of,
    pruned,
    watching,
)
from mone_megatron.lab.sparsification.layered import LayeredModel
from mone_megatron.lab.sparsification.places import Place, places_of
from mone_megatron.lab.sparsification.plans import LayerChoice, Plan, dense
from mone_megatron.lab.sparsification.ranking import Tally
from mone_megatron.lab.sparsification.statistics import LayerStatistics

# What was pruned in the layers so far.
_Prefix = tuple[LayerChoice | None, ...]
# Hidden states of all batches.
_States = list[Tensor]
# Windows of a batch, and tokens of each.
_Shape = tuple[int, int]


@dataclass
class _Inputs:
    """Holds what the model gives its layers.

    Attributes:
        states: hidden states to the first layer, a tensor a batch.
        arguments: beside them, by layer and shape of the batch; they do not depend on the tokens.
    """

    states: _States = field(default_factory=list)
    arguments: dict[tuple[int, _Shape], dict[str, Any]] = field(default_factory=dict)


class _Record(nn.Identity):
    """Notes what it is given in place of a layer, and gives it on, which computes no experts."""

    def __init__(self, number: int, inputs: _Inputs) -> None:
        super().__init__()
        self._number, self._inputs = number, inputs

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, **arguments: Any
    ) -> Tensor:
        """Returns ``hidden_states`` after noting them."""
        if self._number == 0:
            self._inputs.states.append(hidden_states.cpu())
        self._inputs.arguments.setdefault((self._number, _shape(hidden_states)), arguments)
        return hidden_states


class _Give(nn.Identity):
    """Gives the layers' states in their place, batch by batch, and computes no experts."""

    def __init__(self, states: _States) -> None:
        super().__init__()
        self._states = iter(states)

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, **arguments: Any
    ) -> Tensor:
        """Returns the next batch's states, on the device of ``hidden_states``."""
        return next(self._states).to(hidden_states.device)


class _Pass(nn.Identity):
    """Does nothing in place of a layer."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, **arguments: Any
    ) -> Tensor:
        """Returns ``hidden_states``."""
        return hidden_states


class StreamedEngine:
    """Is an :class:`.engine.Engine` that holds one decoder layer's weights at a time."""

    def __init__(
        self, layered: LayeredModel, targets: Sequence[str], *, seed: int, memory_bytes: int
    ) -> None:
        """Finds the places.

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
        """Returns how many tokens go through one layer, added up over layers and passes."""
        groups = self._groups(plans, text.tokens)
        return text.tokens * sum(
            len({plan_prefix(plan, number + 1) for plan in group})
            for group in groups
            for number in range(len(self.layers))
        )

    def measure(
        self, plans: Sequence[Plan], text: Text, progress: Progress
    ) -> Iterator[tuple[Plan, Measured]]:
        """Yields each plan with what it did to the text; see :class:`.engine.Engine`.

        Plans are known in groups, when their pass has ended.
        """
        tokens = _tokens(text)
        for group in self._groups(plans, text.tokens):
            tallies: dict[_Prefix, tuple[Tally, ...]] = {}
            states = self._pass(group, tokens, progress=progress, tallies=tallies)
            for plan in group:
                ways = [plan_prefix(plan, number + 1) for number in range(len(self.layers))]
                perplexity = self._perplexity(states[ways[-1]], text)
                yield plan, Measured(perplexity, tuple(tallies[way] for way in ways))

    def observe(
        self, text: Text, tops: Sequence[float], progress: Progress
    ) -> list[LayerStatistics]:
        """Returns the activations' statistics, unpruned; see :class:`.engine.Engine`."""
        observers = observers_of(self.layers, self._layered.device)
        self.watch(observers, text, progress)
        return [observer.statistics(tops, text.tokens) for observer in observers.values()]

    def watch(self, watchers: Watchers, text: Text, progress: Progress) -> None:
        """Shows the unpruned model's rows to ``watchers``; see :class:`.engine.Engine`."""
        nothing = dense(len(self.layers))
        self._pass([nothing], _tokens(text), progress=progress, watchers=watchers)

    def ask(
        self, plans: Sequence[Plan], questions: Questions, progress: Progress
    ) -> Iterator[tuple[Plan, list[Score]]]:
        """Yields each plan with the tasks' scores; see :class:`.engine.Engine`.

        Plans are known in groups, when their pass has ended.
        """
        heard = Listener()
        self._run_tasks(questions, heard)
        requests = heard.requests
        batches = batch_requests(requests, questions.batch_size)
        tokens = [batch.tokens_BS for batch in batches]
        for group in self._groups(plans, sum(each.numel() for each in tokens)):
            finished = _by_layer(progress, group)
            states = self._pass(group, tokens, finished=finished)
            for plan in group:
                final = states[plan_prefix(plan, len(self.layers))]
                answers = self._answers(final, batches, requests)
                yield plan, self._run_tasks(questions, Replay(requests, answers))

    def _run_tasks(self, questions: Questions, score: Listener | Replay) -> list[Score]:
        lm = ScoredLM(
            self._layered.tokenizer_dir,
            max_length=questions.facts.max_length,
            score=score,
            framing=questions.facts.framing,
        )
        return run_tasks(lm, questions.tasks, limit=questions.limit)

    @torch.no_grad()
    def _answers(
        self,
        states: _States,
        batches: Sequence[RequestBatch],
        requests: Sequence[ScoreRequest],
    ) -> Answers:
        found: dict[int, tuple[float, bool]] = {}
        with self._given(states):
            for batch in batches:
                tokens_BS = batch.tokens_BS.to(self._layered.device)
                logits = self._layered.model(input_ids=tokens_BS, use_cache=False).logits
                found |= zip(batch.places, answer(batch, logits, requests), strict=True)
        return [found[place] for place in range(len(requests))]

    def _groups(self, plans: Sequence[Plan], tokens: int) -> list[list[Plan]]:
        width = self._layered.model.config.get_text_config().hidden_size
        # The states of one plan, and beside them those that its pass began with.
        size = tokens * width * self._layered.model.dtype.itemsize
        room = max(1, self._memory_bytes // size - 1)
        return [list(plans[start : start + room]) for start in range(0, len(plans), room)]

    def _pass(
        self,
        plans: Sequence[Plan],
        tokens: Sequence[Tensor],
        *,
        progress: Progress = lambda done: None,
        finished: Callable[[], None] = lambda: None,
        watchers: Watchers = MappingProxyType({}),
        tallies: dict[_Prefix, tuple[Tally, ...]] | None = None,
    ) -> dict[_Prefix, _States]:
        """Returns the last layer's output under each plan, by its whole prefix.

        Args:
            plans: plans whose output is wanted.
            tokens: batches of them, int64 ``[B, S]``.
            progress: told of tokens through a layer.
            finished: called after each layer.
            watchers: by layer and index of the place.
            tallies: is given what was computed in the last layer of each prefix.
        """
        inputs = self._inputs(tokens)
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
                        found = stack.enter_context(
                            pruned(places, way[-1], layer=number, seed=self._seed)
                        )
                        for index, place in enumerate(places):
                            if (number, index) in watchers:
                                stack.enter_context(watching(place, watchers[number, index]))
                        after[way] = self._through(layer, number, before, inputs, progress)
                    if tallies is not None:
                        tallies[way] = tuple(found)
                states = after
            finished()
        return states

    @torch.no_grad()
    def _inputs(self, tokens: Sequence[Tensor]) -> _Inputs:
        inputs = _Inputs()
        recorders = [_Record(number, inputs) for number in range(len(self.layers))]
        with self._layered.standing_in(recorders):
            for tokens_BS in tokens:
                here_BS = tokens_BS.to(self._layered.device)
                self._layered.decoder(input_ids=here_BS, use_cache=False)
        return inputs

    @torch.no_grad()
    def _through(
        self,
        layer: nn.Module,
        number: int,
        before: _States,
        inputs: _Inputs,
        progress: Progress,
    ) -> _States:
        after: _States = []
        for states in before:
            windows, tokens = _shape(states)
            arguments = inputs.arguments[number, (windows, tokens)]
            after.append(layer(states.to(self._layered.device), **arguments).cpu())
            progress(windows * tokens)
        return after

    def _given(self, states: _States) -> AbstractContextManager[None]:
        """Makes the model give what its layers have computed, batch by batch, through its head."""
        rest = [_Pass() for _ in self.layers[1:]]
        return self._layered.standing_in([_Give(states), *rest])

    def _perplexity(self, states: _States, text: Text) -> Perplexity:
        with self._given(states):
            return measure_perplexity(
                self._layered.model,
                text.windows,
                bytes_of_token=text.bytes_of_token,
                batch_size=text.batch_size,
                max_tokens=text.max_tokens,
            )


def plan_prefix(plan: Plan, layers: int) -> _Prefix:
    """Returns what a plan prunes in the first ``layers`` layers."""
    return tuple(plan.at(number) for number in range(layers))


def _shape(hidden_states: Tensor) -> _Shape:
    windows, tokens = hidden_states.shape[:2]
    return windows, tokens


def _tokens(text: Text) -> list[Tensor]:
    """Returns what the model reads of a text: all but the last token of every window."""
    return [torch.from_numpy(np.stack(batch))[:, :-1] for batch in text.batches()]


def _by_layer(progress: Progress, group: Sequence[Plan]) -> Callable[[], None]:
    """Tells ``progress`` that all plans of a group are a layer further."""
    return lambda: progress(len(group))
