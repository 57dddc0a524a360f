"""Writes results as a table and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from mone_megatron.evaluation.estimates import Estimate
from mone_megatron.evaluation.evaluate import Compared, Measured, ModelResult, Settings
from mone_megatron.evaluation.harness import Score
from mone_megatron.report.formatting import ABSENT, format_count, plus_minus, text_table
from mone_megatron.whole_files import json_text

_FORMAT = 1
_PACKAGES = ("torch", "transformers", "lm_eval")
_LEGEND = (
    "value ± standard error; n: questions, or windows of a perplexity; differences are to the "
    "first model, of the same questions or tokens unless it says unpaired"
)


def table(results: Sequence[ModelResult], compared: Sequence[Compared]) -> str:
    """Returns a line for each metric, a column for each model and each difference to the first."""
    differences = {
        (entry.label, entry.score.task, entry.score.metric): entry.difference for entry in compared
    }
    labels = [result.label for result in results]
    header = ["task", "metric", "shots", "n", *labels]
    header += [f"{label} - {labels[0]}" for label in labels[1:]]
    by_model = [{(s.task, s.metric): s for s in result.scores} for result in results]
    rows = []
    for score in dict.fromkeys(key for scores in by_model for key in scores):
        found = [scores.get(score) for scores in by_model]
        one = next(entry for entry in found if entry is not None)
        row = [
            one.task,
            f"{one.metric} {_direction(one)}".rstrip(),
            ABSENT if one.num_fewshot is None else str(one.num_fewshot),
            str(one.estimate.count),
            *(ABSENT if entry is None else _plus_minus(entry.estimate) for entry in found),
        ]
        for label in labels[1:]:
            change = differences.get((label, *score))
            if change is None:
                row.append(ABSENT)
            else:
                apart = "" if change.paired else " unpaired"
                row.append(_with_error(_number(change.value, sign=True), change.stderr) + apart)
        rows.append(row)
    return f"{text_table(header, rows, left=(0, 1))}\n\n{_LEGEND}"


def _size(parameters: int | None) -> str:
    return "of unknown size" if parameters is None else f"{format_count(parameters)} parameters"


def notes(results: Sequence[ModelResult]) -> list[str]:
    """Returns what the table has no column for: sizes of corpora, and the trainer's own losses."""
    lines = []
    for result in results:
        lines.append(
            f"{result.label}: {result.source}, {_size(result.parameters)}, "
            f"{result.dtype}, {result.seconds:.0f} s"
        )
        lines.append(f"  {result.facts.beginning}")
        for measured in result.measured:
            lines.append(f"  {_corpus_line(measured)}")
            if measured.recorded is not None:
                loss, recorded = measured.perplexity.loss.value, measured.recorded
                lines.append(
                    f"  its trainer's val_loss after step {recorded.step}: {recorded.loss:.6f}; "
                    f"here {loss:.6f}, difference {loss - recorded.loss:+.1e}"
                )
    return lines


def as_json(
    results: Sequence[ModelResult],
    compared: Sequence[Compared],
    settings: Settings,
    tasks: Sequence[str],
) -> str:
    """Returns everything as JSON, for programs; numbers that are not finite become null."""
    content = {
        "format": _FORMAT,
        "versions": {name: version(name) for name in _PACKAGES},
        "settings": {
            "tasks": list(tasks),
            "limit": settings.limit,
            "batch_size": settings.batch_size,
            "seq_length": settings.seq_length,
            "max_tokens": settings.max_tokens,
            "device": settings.device,
        },
        "models": [_model(result) for result in results],
        "differences": [
            {
                "model": entry.label,
                "minus": results[0].label,
                "task": entry.score.task,
                "metric": entry.score.metric,
                "value": entry.difference.value,
                "stderr": entry.difference.stderr,
                "paired": entry.difference.paired,
            }
            for entry in compared
        ],
    }
    return json_text(content)


def _model(result: ModelResult) -> dict[str, Any]:
    return {
        "label": result.label,
        "where": result.facts.where,
        "source": result.source,
        "step": result.facts.step,
        "dtype": result.dtype,
        "parameters": result.parameters,
        "max_length": result.facts.max_length,
        "texts": result.facts.beginning,
        "opening": list(result.facts.framing.opening),
        "seconds": result.seconds,
        "scores": [_score(score) for score in result.scores],
        "corpora": [_corpus(measured) for measured in result.measured],
    }


def _score(score: Score) -> Mapping[str, Any]:
    return {
        "task": score.task,
        "metric": score.metric,
        "value": score.estimate.value,
        "stderr": score.estimate.stderr,
        "samples": score.estimate.count,
        "num_fewshot": score.num_fewshot,
        "higher_is_better": score.higher_is_better,
    }


def _corpus(measured: Measured) -> Mapping[str, Any]:
    found, recorded = measured.perplexity, measured.recorded
    return {
        "corpus": measured.corpus,
        "tokens": found.tokens,
        "bytes": found.text_bytes,
        "windows": found.windows,
        "trainer_val_loss": None if recorded is None else recorded.loss,
        "trainer_step": None if recorded is None else recorded.step,
    }


def _corpus_line(measured: Measured) -> str:
    found = measured.perplexity
    text = "bytes unknown" if found.text_bytes is None else f"{found.text_bytes:,} bytes"
    return f"{measured.corpus}: {found.tokens:,} tokens ({text}) in {found.windows:,} windows"


def _direction(score: Score) -> str:
    return {True: "↑", False: "↓", None: ""}[score.higher_is_better]


def _plus_minus(estimate: Estimate) -> str:
    return _with_error(_number(estimate.value), estimate.stderr)


def _with_error(value: str, error: float) -> str:
    return plus_minus(value, error, ".4f" if error < 1e5 else ".4g")


def _number(value: float, *, sign: bool = False) -> str:
    plus = "+" if sign else ""
    return format(value, f"{plus}.4f" if abs(value) < 1e5 else f"{plus}.4g")
