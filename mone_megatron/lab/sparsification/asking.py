"""Asks a model all questions at once, and gives one plan's answers after the other.

A model of which one layer at a time is in memory cannot be asked question by question. The harness
is run once to hear what it asks, and once for each plan with the answers.

Shape suffixes: B requests, S positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mone_megatron.evaluation.models import ModelFacts
from mone_megatron.evaluation.requests import ScoreRequest
from mone_megatron.evaluation.tasks import LoadedTasks

# Log-likelihood of each request's scored tokens, and whether they are the greedy ones.
Answers = list[tuple[float, bool]]


@dataclass(frozen=True)
class Questions:
    """Holds the tasks to ask.

    Attributes:
        tasks: loaded.
        facts: what is known of the model that is asked.
        limit: questions of each task; None for all.
        batch_size: sequences at once.
    """

    tasks: LoadedTasks
    facts: ModelFacts
    limit: int | None
    batch_size: int


def refuse_writing(tasks: LoadedTasks) -> None:
    """Refuses tasks that cannot be asked all at once.

    Raises:
        ValueError: a task has the model write text.
    """
    for name, task in tasks.tasks.items():
        if task.OUTPUT_TYPE == "generate_until":
            raise ValueError(f"--stream: {name} has the model write text; leave it out")


class Listener:
    """Hears what is asked and answers nothing of meaning; it is a ``score`` of ``ScoredLM``."""

    def __init__(self) -> None:
        self.requests: list[ScoreRequest] = []

    def __call__(self, requests: Sequence[ScoreRequest]) -> Answers:
        """Notes the requests and answers each with (0.0, False)."""
        self.requests += requests
        return [(0.0, False)] * len(requests)


class Replay:
    """Answers in the order in which a :class:`Listener` was asked.

    It is a ``score`` of ``ScoredLM``.
    """

    def __init__(self, requests: Sequence[ScoreRequest], answers: Answers) -> None:
        self._pairs = iter(zip(requests, answers, strict=True))

    def __call__(self, requests: Sequence[ScoreRequest]) -> Answers:
        """Returns the next answers, which are those of these requests."""
        answers: Answers = []
        for request in requests:
            asked, answer = next(self._pairs)
            assert asked == request, "the harness asks the same every time"
            answers.append(answer)
        return answers


@dataclass(frozen=True)
class RequestBatch:
    """Holds requests of like length as one batch.

    Attributes:
        places: where the requests stand among all.
        tokens_BS: what the model reads, filled up behind with token 0, which nothing before sees.
        labels_BS: what it is to predict.
    """

    places: tuple[int, ...]
    tokens_BS: Tensor
    labels_BS: Tensor


def batch_requests(requests: Sequence[ScoreRequest], batch_size: int) -> list[RequestBatch]:
    """Returns all requests in batches, long ones first."""
    order = sorted(range(len(requests)), key=lambda place: -len(requests[place].tokens))
    batches = []
    for start in range(0, len(order), batch_size):
        places = tuple(order[start : start + batch_size])
        longest = len(requests[places[0]].tokens)
        both = torch.zeros(len(places), longest, dtype=torch.int64)
        for row, place in enumerate(places):
            tokens = torch.tensor(requests[place].tokens)
            both[row, : len(tokens)] = tokens
        batches.append(RequestBatch(places, both[:, :-1], both[:, 1:]))
    return batches


def answer(batch: RequestBatch, logits_BSV: Tensor, requests: Sequence[ScoreRequest]) -> Answers:
    """Returns the answers of one batch from the model's logits."""
    labels_BS = batch.labels_BS.to(logits_BSV.device)
    greedy_BS = (logits_BSV.argmax(dim=-1) == labels_BS).cpu()
    answers: Answers = []
    for row, place in enumerate(batch.places):
        request = requests[place]
        end = len(request.tokens) - 1
        scored = slice(end - request.scored, end)
        logs_SV = logits_BSV[row, scored].float().log_softmax(dim=-1)
        chosen_S = logs_SV.gather(-1, labels_BS[row, scored].unsqueeze(-1))
        total = float(chosen_S.sum(dtype=torch.float64))
        answers.append((total, bool(greedy_BS[row, scored].all())))
    return answers
