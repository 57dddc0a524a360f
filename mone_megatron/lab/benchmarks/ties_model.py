"""Measures the tie rule on a trained model's weights: loads and loss with each tie order.

Shape suffixes: T tokens (rows).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mone_megatron.evaluation.corpora import Window, open_corpus
from mone_megatron.evaluation.evaluate import read_corpora
from mone_megatron.evaluation.models import look_at
from mone_megatron.evaluation.perplexity import Perplexity, measure_perplexity
from mone_megatron.hf.loading import load_model
from mone_megatron.lab.benchmarks.ties import TieCounter, TieStatistics, TieWay, tie_statistics
from mone_megatron.lab.sparsification.places import (
    check_definable,
    choose_targets,
    compute_all_neurons,
    decoder_layers,
    places_of,
)
from mone_megatron.lab.sparsification.plans import SCORES, kept_neurons
from mone_megatron.lab.sparsification.ranking import Rows, score_rows


@dataclass(frozen=True)
class MeasuredTies:
    """Holds what a model does whose neurons are selected with one dtype and tie order.

    Attributes:
        way: the dtype of weights and activations, and the tie order, in words.
        loss: nats a token.
        loss_error: its standard error over the windows of text; None for a single window.
        ties: over all layers; the experts of a layer are counted together.
    """

    way: str
    loss: float
    loss_error: float | None
    ties: TieStatistics


@dataclass(frozen=True)
class ModelTies:
    """Holds a model's measurements with every dtype and tie order, on the same text."""

    model: str
    score: str
    keep_ratio: float
    tokens: int
    measured: list[MeasuredTies]


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def measure_model(
    where: str,
    text: str,
    *,
    ways: Sequence[TieWay],
    keep_ratio: float,
    score: str,
    max_tokens: int,
    seq_length: int,
    say: Callable[[str], None],
) -> ModelTies:
    """Selects neurons in every layer of a model with each dtype and tie order.

    Args:
        where: a run, an export or any transformers model that can be sparsified.
        text: a corpus as ``tools/eval_hf.py`` takes it.
        ways: measured one after the other.
        keep_ratio: share of the neurons that a token keeps.
        score: what ranks them.
        max_tokens: stop after the window with which so many are predicted.
        seq_length: tokens of a window.
        say: is told what the user should know of the reading.

    Raises:
        ValueError: no model or text there, the model has no neurons to select, or its layers are
            of several widths.
    """
    if not 0 < keep_ratio < 1:
        raise ValueError(f"--keep-ratio: {keep_ratio:g} is not between 0 and 1")
    if score not in SCORES:
        raise ValueError(f"--score: {score!r} is unknown; use one of {', '.join(SCORES)}")
    facts = look_at(where)
    ((_, windows),) = read_corpora(facts, [open_corpus(text)], seq_length, say=say)
    measured, tokens = [], 0
    for way in ways:
        model = load_model(where, dtype=_DTYPES[way.dtype]).model
        compute_all_neurons(model)
        counters, perplexity = _run(model, windows, way, keep_ratio, score, max_tokens)
        tokens = perplexity.tokens
        error = perplexity.loss.stderr
        measured.append(
            MeasuredTies(
                way=str(way),
                loss=perplexity.loss.value,
                loss_error=error if math.isfinite(error) else None,
                ties=tie_statistics(counters),
            )
        )
    return ModelTies(where, score, keep_ratio, tokens, measured)


def _run(
    model: PreTrainedModel,
    windows: Sequence[Window],
    way: TieWay,
    keep_ratio: float,
    score: str,
    max_tokens: int,
) -> tuple[list[TieCounter], Perplexity]:
    targets = choose_targets(model, None)
    places = [place for layer in decoder_layers(model) for place in places_of(layer, targets)]
    check_definable(places, [score])
    widths = sorted({place.neurons for place in places})
    if len(widths) > 1:
        raise ValueError(
            f"--model: its layers have {' and '.join(map(str, widths))} neurons, and ties are "
            "counted in layers of one width only"
        )
    kept = kept_neurons(1 - keep_ratio, widths[0])
    counters = [
        TieCounter(way.order, widths[0], kept, experts=1, seed=number)
        for number in range(len(places))
    ]
    with ExitStack() as stack:
        for place, counter in zip(places, counters, strict=True):
            counter.counting = True
            stack.enter_context(place.attached(_Chooser(counter, score)))
        perplexity = measure_perplexity(
            model, windows, bytes_of_token=None, batch_size=1, max_tokens=max_tokens
        )
    return counters, perplexity


class _Chooser:
    """Ranks the rows that a place computes and lets a counter choose."""

    def __init__(self, counter: TieCounter, score: str) -> None:
        self._counter, self._score = counter, score

    def __call__(self, rows: Rows) -> Tensor:
        with torch.no_grad():
            return self._counter.choose(score_rows(self._score, rows).cpu())
