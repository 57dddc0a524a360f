"""Runs loaded tasks through lm-evaluation-harness and gives every metric its standard error.

The harness makes the requests, scores the answers and defines the metrics. Its standard errors are
not used: it has none for some metrics, and bootstraps others in processes forked from this one.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from lm_eval.api import metrics as harness_metrics
from lm_eval.api.group import Group
from lm_eval.api.model import LM
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate

from mone_megatron.evaluation.estimates import Estimate, bootstrapped, ratio
from mone_megatron.evaluation.tasks import FEWSHOT_SEED, LoadedTasks

# The filter of a task that filters nothing.
_NO_FILTER = "none"


@dataclass(frozen=True)
class Score:
    """Holds one metric of one task, or of a perplexity corpus.

    Attributes:
        task: its name; of a perplexity the corpus.
        metric: ``acc``, ``acc_norm``, ...; with a filter that is not the default ``acc/FILTER``.
        estimate: value and standard error.
        higher_is_better: None where the task does not say.
        num_fewshot: examples before each question; None for a perplexity or a group.
        samples: digest of the questions, in order: equal where two scores may be paired.
    """

    task: str
    metric: str
    estimate: Estimate
    higher_is_better: bool | None
    num_fewshot: int | None
    samples: str


def run_tasks(lm: LM, loaded: LoadedTasks, *, limit: int | None = None) -> list[Score]:
    """Asks ``lm`` all questions, or the first ``limit`` of each task.

    It draws from no global random stream. Every call asks the same questions with the same
    examples.

    Returns:
        The scores, by task in the order they were loaded; groups with an aggregate come last.
    """
    for task in loaded.tasks.values():
        task.set_fewshot_seed(FEWSHOT_SEED)
    with _less_talk():
        results = evaluate(
            lm,
            loaded.as_dict(),
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
        )
    assert results is not None, "the LM says that this process is not the first"
    scores: list[Score] = []
    for name, task in loaded.tasks.items():
        scores += _task_scores(name, task, results["samples"][name])
    for name, group in loaded.groups.items():
        scores += _group_scores(group, results["results"].get(name, {}), scores)
    return scores


def _task_scores(name: str, task: Task, samples: Sequence[Mapping[str, Any]]) -> Iterator[Score]:
    by_metric: dict[tuple[str, str], list[Any]] = defaultdict(list)
    digests: dict[tuple[str, str], Any] = defaultdict(hashlib.sha256)
    for sample in samples:
        for metric in sample["metrics"]:
            key = metric, sample["filter"]
            by_metric[key].append(sample[metric])
            digests[key].update(f"{sample['doc_hash']} {sample['prompt_hash']}".encode())
    aggregations, better = task.aggregation(), task.higher_is_better()
    for (metric, filtered), values in by_metric.items():
        yield Score(
            task=name,
            metric=metric if filtered == _NO_FILTER else f"{metric}/{filtered}",
            estimate=_estimate(aggregations.get(metric, harness_metrics.mean), values),
            higher_is_better=better.get(metric),
            num_fewshot=task.get_config("num_fewshot"),
            samples=digests[metric, filtered].hexdigest(),
        )


def _estimate(aggregation: Any, values: list[Any]) -> Estimate:
    """Returns the harness's aggregate of one task's samples, with its standard error.

    ``values`` are numbers, log-likelihoods (``perplexity``), pairs of a log-likelihood and a weight
    (the weighted ones), or whatever the aggregation takes.
    """
    if aggregation is harness_metrics.mean:
        return ratio(values)
    if aggregation is harness_metrics.perplexity:
        return ratio(values, scale=-1.0, exponential=True)
    if aggregation is harness_metrics.weighted_perplexity:
        likelihoods, weights = np.asarray(values, dtype=np.float64).T
        return ratio(likelihoods, weights, scale=-1.0, exponential=True)
    if aggregation is harness_metrics.bits_per_byte:
        likelihoods, weights = np.asarray(values, dtype=np.float64).T
        return ratio(likelihoods, weights, scale=-1.0 / math.log(2))
    return bootstrapped(aggregation, values)


def _group_scores(
    group: Group, results: Mapping[str, Any], scores: Sequence[Score]
) -> Iterator[Score]:
    """Yields a group's aggregates; its tasks are independent samples of their own."""
    members = {task.task_name for task in group.get_all_tasks()}
    for settings in group.aggregate_metric_list or []:
        parts = [
            score for score in scores if score.task in members and score.metric == settings.metric
        ]
        key = f"{settings.metric},{_NO_FILTER}"
        if not parts or key not in results:
            continue
        sizes = [part.estimate.count if settings.weight_by_size else 1 for part in parts]
        weights = [size / sum(sizes) for size in sizes]
        yield Score(
            task=group.name,
            metric=settings.metric,
            estimate=_weighted(float(results[key]), parts, weights),
            higher_is_better=parts[0].higher_is_better,
            num_fewshot=None,
            samples=hashlib.sha256("".join(part.samples for part in parts).encode()).hexdigest(),
        )


def _weighted(value: float, parts: Sequence[Score], weights: Sequence[float]) -> Estimate:
    """Returns the weighted sum of estimates of independent samples, whose value is known."""
    count = sum(part.estimate.count for part in parts)
    scaled = [
        # Over all samples together, the squares of these add up to the sum's variance.
        part.estimate.influence * weight * count / part.estimate.count
        for part, weight in zip(parts, weights, strict=True)
    ]
    replicates = [
        part.estimate.replicates * weight for part, weight in zip(parts, weights, strict=True)
    ]
    return Estimate(value, count, np.concatenate(scaled), np.sum(replicates, axis=0))


@contextmanager
def _less_talk() -> Iterator[None]:
    """Keeps the harness's warnings about its own defaults away; errors are shown."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
