"""Evaluates models: tasks and perplexities of each, and the differences to the first."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from mone_megatron import command_line
from mone_megatron.data.framing import Framing
from mone_megatron.evaluation.corpora import Corpus, Reader, Recorded, RunValidation, Window
from mone_megatron.evaluation.estimates import Difference, difference
from mone_megatron.evaluation.harness import Score, run_tasks
from mone_megatron.evaluation.harness_tokens import fitted, rolling_windows
from mone_megatron.evaluation.models import ModelFacts, load
from mone_megatron.evaluation.perplexity import Perplexity, measure_perplexity
from mone_megatron.evaluation.scored_lm import ScoredLM
from mone_megatron.evaluation.served import ServedModel
from mone_megatron.evaluation.tasks import LoadedTasks
from mone_megatron.evaluation.token_bytes import bytes_of_tokens

# Windows of long-context models are cut here unless asked otherwise.
LONGEST_WINDOW = 2048

# Log-likelihoods, and whether they are the greedy ones.
Answers = list[tuple[float, bool]]


@dataclass(frozen=True)
class Settings:
    """Describes how to evaluate.

    Attributes:
        batch_size: sequences in one forward pass.
        limit: questions of each task; None for all.
        seq_length: tokens of a window of text or of a ``.bin``.
        max_tokens: of each corpus; None for all.
        dtype: of weights and activations; None for the model's own.
        device: as torch names it.
        trust_remote_code: whether a model may bring code of its own.
    """

    batch_size: int
    limit: int | None
    seq_length: int
    max_tokens: int | None
    dtype: torch.dtype | None
    device: str
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Measured:
    """Holds a perplexity, and what the trainer wrote down for the same samples if it did."""

    corpus: str
    perplexity: Perplexity
    recorded: Recorded | None


@dataclass(frozen=True)
class ModelResult:
    """Holds one model's scores: of all tasks, then of all corpora."""

    label: str
    facts: ModelFacts
    source: str
    dtype: str
    # None for a server's, which does not say.
    parameters: int | None
    seconds: float
    scores: Sequence[Score]
    measured: Sequence[Measured]


@dataclass(frozen=True)
class Compared:
    """Holds a score of a model minus the first model's."""

    label: str
    score: Score
    difference: Difference


def read_corpora(
    facts: ModelFacts,
    corpora: Sequence[Corpus],
    seq_length: int,
    *,
    say: Callable[[str], None] = command_line.say,
) -> list[tuple[Corpus, Sequence[Window]]]:
    """Returns the corpora with their windows as a model reads them; needs no weights.

    Args:
        facts: of the model.
        corpora: to read.
        seq_length: tokens of a window.
        say: is told what the user should know of the reading.

    Raises:
        ValueError: it cannot read one of them: one line that names both.
    """
    if corpora and seq_length > facts.max_length:
        raise ValueError(
            f"--seq-length: {seq_length} is more than the {facts.max_length} tokens that "
            f"{facts.where} is made for; use {facts.max_length} or less"
        )
    reader = Reader(facts.tokenizer, facts.vocab_size, seq_length, facts.framing)
    try:
        return [(corpus, corpus.windows(reader, say)) for corpus in corpora]
    except ValueError as error:
        raise ValueError(f"{facts.where}: {error}") from error


def common_length(models: Sequence[ModelFacts]) -> int:
    """Returns the longest window that all models are made for, up to ``LONGEST_WINDOW``."""
    return min(LONGEST_WINDOW, *(facts.max_length for facts in models))


def evaluate_model(
    facts: ModelFacts,
    *,
    label: str,
    tasks: LoadedTasks | None,
    corpora: Sequence[tuple[Corpus, Sequence[Window]]],
    settings: Settings,
    say: Callable[[str], None],
) -> ModelResult:
    """Loads one model and measures everything.

    Args:
        facts: of the model.
        label: what to call it.
        tasks: loaded; None for none.
        corpora: from :func:`read_corpora`.
        settings: how to evaluate.
        say: is told what begins.

    Raises:
        ValueError: the model cannot be loaded.
    """
    started = time.perf_counter()
    say(f"{label}: loading {facts.where}")
    loaded = load(
        facts,
        dtype=settings.dtype,
        device=settings.device,
        trust_remote_code=settings.trust_remote_code,
    )
    scores: list[Score] = []
    measured: list[Measured] = []
    for corpus, windows in corpora:
        say(f"{label}: perplexity on {corpus.name}")
        result = _measure(facts, loaded.model, corpus, windows, settings)
        measured.append(result)
        scores += perplexity_scores(corpus.name, result.perplexity)
    if tasks is not None:
        say(f"{label}: {', '.join(tasks.tasks)}")
        lm = harness_model(loaded.model, facts, batch_size=settings.batch_size)
        scores = [*run_tasks(lm, tasks, limit=settings.limit), *scores]
    return ModelResult(
        label=label,
        facts=facts,
        source=loaded.source,
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        parameters=sum(weight.numel() for weight in loaded.model.parameters()),
        seconds=time.perf_counter() - started,
        scores=scores,
        measured=measured,
    )


def evaluate_served(
    facts: ModelFacts,
    served: ServedModel,
    *,
    label: str,
    tasks: LoadedTasks,
    limit: int | None,
    say: Callable[[str], None],
) -> ModelResult:
    """Asks a server everything that :func:`evaluate_model` asks a model in this process.

    Args:
        facts: of the model that is served: its tokenizer, and how its texts begin.
        served: the model on its server.
        label: what to call it.
        tasks: loaded, none of which has the model write text.
        limit: questions of each task; None for all.
        say: is told what begins.

    Raises:
        ValueError: a task has the model write text, or the server does not answer.
    """
    started = time.perf_counter()
    for name, task in tasks.tasks.items():
        if task.OUTPUT_TYPE == "generate_until":
            raise ValueError(f"--server: {name} has the model write text; leave out --server")
    say(f"{label}: {', '.join(tasks.tasks)}, by {served.url}")
    lm = ScoredLM(
        facts.tokenizer_dir,
        max_length=min(facts.max_length, served.max_length),
        score=served.score,
        framing=facts.framing,
    )
    scores = run_tasks(lm, tasks, limit=limit)
    return ModelResult(
        label=label,
        facts=facts,
        source=f"{served.name} at {served.url}",
        dtype="the server's dtype",
        parameters=None,
        seconds=time.perf_counter() - started,
        scores=scores,
        measured=[],
    )


def compare(results: Sequence[ModelResult]) -> list[Compared]:
    """Returns every model's scores minus the first model's, where both have them."""
    if not results:
        return []
    first = {(score.task, score.metric): score for score in results[0].scores}
    compared = []
    for result in results[1:]:
        for score in result.scores:
            base = first.get((score.task, score.metric))
            if base is None:
                continue
            paired = base.samples == score.samples
            compared.append(
                Compared(
                    result.label,
                    score,
                    difference(score.estimate, base.estimate, same_samples=paired),
                )
            )
    return compared


class _FramedLM(HFLM):
    """Is the harness's own class, with texts that begin as in the model's training."""

    def __init__(self, *, framing: Framing, **settings: Any) -> None:
        known = framing.opening or framing.eod is not None
        super().__init__(prefix_token_id=framing.context[-1] if known else None, **settings)
        self._framing = framing

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Returns log-likelihoods of whole texts; where they begin with a BOS, each window does."""
        if not self._framing.opening:
            totals: list[float] = super().loglikelihood_rolling(requests, disable_tqdm)
            return totals
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            pairs = rolling_windows(ids, self._framing.opening, self.max_length)
            windows += [(None, context, wanted) for context, wanted in pairs]
            owners += [owner] * len(pairs)
        totals = [0.0] * len(requests)
        answers = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for owner, (value, _) in zip(owners, answers, strict=True):
            totals[owner] += value
        return totals

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> Answers:
        fit = [
            (key, *fitted(context, wanted, self._framing, self.max_length))
            for key, context, wanted in requests
        ]
        answers: Answers = super()._loglikelihood_tokens(fit, disable_tqdm, override_bs)
        return answers

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Returns prompts and their mask; a long one loses its beginning, but not the opening."""
        ids: Tensor
        ids, mask = super().tok_batch_encode(
            strings, padding_side, left_truncate_len=left_truncate_len, truncation=truncation
        )
        opening = torch.tensor(self._framing.opening, dtype=ids.dtype, device=ids.device)
        size = opening.numel()
        if left_truncate_len and size and size < ids.shape[1]:
            # Rows without padding: those that were cut, and the longest, which begins with it.
            ids[mask[:, 0].bool(), :size] = opening
        return ids, mask


class _QuietLM(_FramedLM):
    """Shows no bars of its own, for those who show how far they are themselves."""

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> Answers:
        answers: Answers = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        totals: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=True)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        texts: list[str] = super().generate_until(requests, disable_tqdm=True)
        return texts

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = True, override_bs: int | None = None
    ) -> Answers:
        answers: Answers = super()._loglikelihood_tokens(requests, True, override_bs)
        return answers


def harness_model(
    model: PreTrainedModel, facts: ModelFacts, *, batch_size: int, quiet: bool = False
) -> HFLM:
    """Returns the harness's model of a transformers model; texts begin as in its training.

    ``quiet`` leaves its bars out.
    """
    logger = logging.getLogger("lm_eval.models.huggingface")
    before = logger.level
    # It warns that a loaded model ignores arguments which are not given.
    logger.setLevel(logging.ERROR)
    try:
        return (_QuietLM if quiet else _FramedLM)(
            framing=facts.framing,
            pretrained=model,
            tokenizer=facts.tokenizer,
            backend="causal",
            max_length=facts.max_length,
            batch_size=batch_size,
            softmax_dtype="float32",
            # With it, windows of a text that repeats itself share logits, and 0.4.13 takes the
            # wrong ones of them where the windows differ in how much is scored.
            logits_cache=False,
        )
    finally:
        logger.setLevel(before)


def _measure(
    facts: ModelFacts,
    model: PreTrainedModel,
    corpus: Corpus,
    windows: Sequence[Window],
    settings: Settings,
) -> Measured:
    # All windows are as long as the first, but for the last.
    total = (len(windows) - 1) * (windows[0].size - 1) + windows[len(windows) - 1].size - 1
    if settings.max_tokens is not None:
        total = min(total, settings.max_tokens)
    with tqdm(total=total, desc=corpus.name, unit="tok", unit_scale=True) as bar:
        perplexity = measure_perplexity(
            model,
            windows,
            bytes_of_token=bytes_of_tokens(facts.tokenizer.backend_tokenizer, facts.vocab_size),
            batch_size=settings.batch_size,
            max_tokens=settings.max_tokens,
            progress=bar.update,
        )
    recorded = None
    whole = settings.max_tokens is None
    if whole and isinstance(corpus, RunValidation) and corpus.has_written(Path(facts.where)):
        recorded = corpus.recorded(facts.step)
    return Measured(corpus.name, perplexity, recorded)


def perplexity_scores(corpus: str, found: Perplexity) -> list[Score]:
    """Returns a corpus's loss, perplexity and, where the bytes are known, bits per byte."""
    estimates = {"loss": found.loss, "perplexity": found.perplexity}
    if found.bits_per_byte is not None:
        estimates["bits_per_byte"] = found.bits_per_byte
    return [
        Score(
            task=corpus,
            metric=metric,
            estimate=estimate,
            higher_is_better=False,
            num_fewshot=None,
            samples=found.fingerprint,
        )
        for metric, estimate in estimates.items()
    ]
