"""Writes studies as tables, CSV and JSON, and pictures, into a folder."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mone_megatron.evaluation.estimates import Difference
from mone_megatron.lab.sparsification.figures import figures
from mone_megatron.lab.sparsification.findings import BudgetResult, Point, Study, granularity
from mone_megatron.lab.sparsification.plans import OTHER_EXPERTS, RANK, SUPER_EXPERTS
from mone_megatron.report.formatting import format_number, plus_minus, text_table
from mone_megatron.report.identified import NOT_IDENTIFIED, reasons
from mone_megatron.report.plots import png_bytes
from mone_megatron.whole_files import json_text, write_whole

SUMMARY_FILE = "summary.json"
_FORMAT = 1
_PACKAGES = ("torch", "transformers", "lm_eval")
_CURVE_HEADER = (
    "model", "score", "share", "pruned", "task", "metric", "value", "stderr", "samples",
    "difference", "difference_stderr", "paired", "rule", "activated",
)  # fmt: skip
_THRESHOLD_HEADER = (
    "model", "layer", "target", "neurons", "top", "pooled", "per_token", "not_identified",
)  # fmt: skip
_REMOVAL_HEADER = (
    "model", "removed", "share", "held", "activated", "pruned", "loss_rise", "stderr", "paired",
)  # fmt: skip
_BUDGET_HEADER = ("model", "layer", "share")


def write(folder: Path, studies: Sequence[Study], settings: Mapping[str, Any]) -> list[Path]:
    """Writes everything into ``folder`` and returns the files."""
    written = [
        write_whole(folder / SUMMARY_FILE, _json(studies, settings)),
        write_whole(folder / "curve.csv", _csv(_CURVE_HEADER, _curve_rows(studies))),
    ]
    if any(study.statistics for study in studies):
        rows = _threshold_rows(studies)
        written.append(write_whole(folder / "thresholds.csv", _csv(_THRESHOLD_HEADER, rows)))
    if any(study.budget for study in studies):
        written.append(
            write_whole(folder / "budget.csv", _csv(_BUDGET_HEADER, _budget_rows(studies)))
        )
    if any(study.removals for study in studies):
        rows = _removal_rows(studies)
        written.append(write_whole(folder / "granularity.csv", _csv(_REMOVAL_HEADER, rows)))
    written += [write_whole(folder / name, png_bytes(one)) for name, one in figures(studies)]
    return written


def report(studies: Sequence[Study]) -> str:
    """Returns what people read first: losses and tasks by share, thresholds, budgets."""
    parts = []
    for study in studies:
        parts.append(_curve_table(study))
        if study.statistics:
            parts.append(_threshold_table(study))
        if study.budget is not None:
            parts.append(_budget_lines(study.label, study.budget))
        if study.removals:
            parts.append(_removal_table(study))
        if study.truncations:
            parts.append(_truncation_table(study))
    parts.append(
        "value ± standard error; in brackets the difference to the model as it is, paired on the "
        "same windows or questions, ± its standard error. pruned: of all neurons of a token, with "
        "those that the model itself leaves out, of thresholds as it came on this text. activated: "
        "of its experts' parameters, with the projections that the score reads of every neuron."
    )
    return "\n\n".join(parts)


def _curve_table(study: Study) -> str:
    named = [
        (at, f"{score.task} {score.metric}" if score.num_fewshot is not None else score.metric)
        for at, score in enumerate(study.dense.scores)
        if score.metric != "bits_per_byte"
    ]
    ruled = any(point.rule != RANK for point in study.points)
    header = ["score", *(["rule"] if ruled else []), "share", "pruned", "activated"]
    header += [name for _, name in named]
    rows = []
    for point in (study.dense, *(point for point in study.points if point.share)):
        row = [point.score, *([point.rule] if ruled else []), f"{point.share:g}"]
        row += [f"{point.pruned:.3f}", f"{point.activated:.3f}"]
        for at, name in named:
            estimate, change = point.scores[at].estimate, point.changes[at]
            text = plus_minus(_number(estimate.value), estimate.stderr, _spec(estimate.stderr))
            # One difference for each thing that was measured.
            if point is not study.dense and name != "perplexity":
                text += f" ({_signed(change)})"
            row.append(text)
        rows.append(row)
    title = f"{study.label}: {', '.join(study.targets)} neurons, {study.tokens:,} tokens"
    if study.beginning:
        title += f"; {study.beginning}"
    left = (0, 1) if ruled else (0,)
    return f"{title}\n{text_table(header, rows, left=left, ruled=False)}"


def _threshold_table(study: Study) -> str:
    tops = [threshold.top for threshold in study.statistics[0].thresholds]
    header = ["layer", "neurons", *(f"top {top:g}" for top in tops)]
    header += [f"top {top:g}, per token" for top in tops]
    rows = [
        [
            f"{entry.layer} {entry.target}",
            str(entry.neurons),
            *(f"{threshold.pooled:.4g}" for threshold in entry.thresholds),
            *(f"{threshold.per_token:.4g}" for threshold in entry.thresholds),
        ]
        for entry in study.statistics
    ]
    title = f"{study.label}: the |a| above which the largest activations of a layer lie"
    unknown = [
        f"{NOT_IDENTIFIED}: layer {entry.layer} {entry.target}, top {one.top:g}: "
        f"{reasons(one.doubts)}"
        for entry in study.statistics
        for one in entry.thresholds
        if one.doubts
    ]
    return "\n".join([title, text_table(header, rows, left=(0,), ruled=False), *unknown])


def _removal_table(study: Study) -> str:
    rows = [
        [
            row.name,
            f"{row.share:.3g}",
            f"{row.held:.3f}",
            f"{row.activated:.3f}",
            _signed(row.change),
        ]
        for row in granularity(study)
    ]
    title = (
        f"{study.label}: what goes for good, and what of a token: share asked for, parameters of "
        "the experts that are held and that a token needs, rise of the loss"
    )
    header = ["removed", "share", "held", "activated", "loss"]
    lines = [title, text_table(header, rows, left=(0,), ruled=False)]
    for removal in study.removals:
        if removal.way in (SUPER_EXPERTS, OTHER_EXPERTS):
            named = " ".join(f"{layer}:{expert}" for layer, expert in removal.experts)
            lines.append(f"{removal.way} (layer:expert): {named or 'none'}")
    return "\n".join(lines)


def _truncation_table(study: Study) -> str:
    header = ["asked", "CETT", "activation ratio", "activated", "perplexity", "calibration"]
    rows = [
        [
            f"CETT {one.asked:g}" if one.asked is not None else f"PPL-{one.rise:g}%",
            f"{one.cett:.4g}",
            f"{1 - one.use.pruned:.4f}",
            f"{one.use.activated:.4f}",
            f"{one.measured:+.3f}%",
            f"{one.calibrated:+.3f}%",
        ]
        for one in study.truncations
    ]
    title = (
        f"{study.label}: tails truncated by the norm of what a neuron adds to its layer; "
        "rises of the perplexity on this text and on the calibration text"
    )
    return f"{title}\n{text_table(header, rows, left=(0,), ruled=False)}"


def _budget_lines(label: str, budget: BudgetResult) -> str:
    best, settings = budget.best.allotment, budget.settings
    shares = " ".join(
        f"{layer}:{share:g}" for layer, share in zip(budget.layers, best.shares, strict=True)
    )
    lines = [
        f"{label}: shares of the layers by {settings.score} within {settings.rise:g} nats: "
        f"{best.pruned:.3f} of all neurons",
        f"  layer:share  {shares}",
        f"  rise of the loss: predicted {best.predicted:.4f}, measured "
        f"{_signed(budget.best_change)}; one share for all layers "
        f"{_signed(budget.uniform_change)}",
    ]
    if budget.elsewhere is not None:
        lines.append(f"  on the text of the study: {_signed(budget.elsewhere)}")
    if budget.doubts:
        lines.append(f"  {NOT_IDENTIFIED}: {reasons(budget.doubts)}")
    return "\n".join(lines)


def _curve_rows(studies: Sequence[Study]) -> Iterator[tuple[Any, ...]]:
    for study in studies:
        for point in (study.dense, *(point for point in study.points if point.share)):
            for score, change in zip(point.scores, point.changes, strict=True):
                estimate = score.estimate
                yield (
                    study.label, point.score, point.share, point.pruned, score.task, score.metric,
                    estimate.value, estimate.stderr, estimate.count,
                    change.value, change.stderr, change.paired, point.rule, point.activated,
                )  # fmt: skip


def _threshold_rows(studies: Sequence[Study]) -> Iterator[tuple[Any, ...]]:
    for study in studies:
        for entry in study.statistics:
            for one in entry.thresholds:
                yield (
                    study.label, entry.layer, entry.target, entry.neurons,
                    one.top, one.pooled, one.per_token, reasons(one.doubts),
                )  # fmt: skip


def _removal_rows(studies: Sequence[Study]) -> Iterator[tuple[Any, ...]]:
    for study in studies:
        for row in granularity(study) if study.removals else ():
            change = row.change
            yield (
                study.label, row.name, row.share, row.held, row.activated, row.pruned,
                change.value, change.stderr, change.paired,
            )  # fmt: skip


def _budget_rows(studies: Sequence[Study]) -> Iterator[tuple[Any, ...]]:
    for study in studies:
        if study.budget is not None:
            shares = study.budget.best.allotment.shares
            for layer, share in zip(study.budget.layers, shares, strict=True):
                yield study.label, layer, share


def _csv(header: Sequence[str], rows: Iterator[tuple[Any, ...]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return buffer.getvalue()


def _json(studies: Sequence[Study], settings: Mapping[str, Any]) -> str:
    content = {
        "format": _FORMAT,
        "versions": {name: version(name) for name in _PACKAGES},
        "settings": dict(settings),
        "models": [_study(study) for study in studies],
    }
    return json_text(content)


def _study(study: Study) -> dict[str, Any]:
    return {
        "label": study.label,
        "where": study.where,
        "targets": list(study.targets),
        "tokens": study.tokens,
        "texts": study.beginning,
        "layers": [
            {"layer": layer.number, "kinds": [vars(kind) for kind in layer.kinds]}
            for layer in study.layers
        ],
        "dense": _point(study.dense),
        "points": [_point(point) for point in study.points],
        "statistics": [entry.to_json() for entry in study.statistics],
        "budget": None if study.budget is None else budget_json(study.budget),
        "removals": [
            {
                "way": one.way,
                "share": one.share,
                "held": one.held,
                "activated": one.use.activated,
                "pruned": one.use.pruned,
                "loss": one.scores[0].estimate.value,
                "loss_rise": _change(one.change),
                "experts": [list(each) for each in one.experts],
            }
            for one in study.removals
        ],
        "truncations": [
            {
                "asked": one.asked,
                "ppl_rise": one.rise,
                "cett": one.cett,
                "activation_ratio": 1 - one.use.pruned,
                "activated": one.use.activated,
                "perplexity_rise": one.measured,
                "perplexity_rise_on_calibration": one.calibrated,
                "loss_rise": _change(one.change),
                "thresholds": [list(layer) for layer in one.thresholds],
            }
            for one in study.truncations
        ],
    }


def _point(point: Point) -> dict[str, Any]:
    return {
        "score": point.score,
        "rule": point.rule,
        "share": point.share,
        "pruned": point.pruned,
        "activated": point.activated,
        "scores": [
            {
                "task": score.task,
                "metric": score.metric,
                "value": score.estimate.value,
                "stderr": score.estimate.stderr,
                "samples": score.estimate.count,
                "higher_is_better": score.higher_is_better,
                "difference": _change(change),
            }
            for score, change in zip(point.scores, point.changes, strict=True)
        ],
    }


def budget_json(budget: BudgetResult) -> dict[str, Any]:
    """Returns a budget's shares and probes for machines; numbers that are not finite are null."""
    best = budget.best.allotment
    return {
        "rise": budget.settings.rise,
        "score": budget.settings.score,
        "sensitivity_shares": list(budget.settings.shares),
        "layers": list(budget.layers),
        "loss": budget.loss,
        "sensitivity": [list(row) for row in budget.sensitivity],
        "shares": list(best.shares),
        "not_identified": [doubt.reason for doubt in budget.doubts],
        "pruned": best.pruned,
        "predicted": best.predicted,
        "measured": _change(budget.best_change),
        "uniform_measured": _change(budget.uniform_change),
        "measured_on_other_text": None if budget.elsewhere is None else _change(budget.elsewhere),
        "probes": [
            {
                "pruned": probe.allotment.pruned,
                "predicted": probe.allotment.predicted,
                "measured": probe.measured,
            }
            for probe in budget.probes
        ],
    }


def _change(change: Difference) -> dict[str, Any]:
    return {
        "value": change.value,
        "stderr": change.stderr,
        "paired": change.paired,
    }


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e4 else format_number(value)


def _spec(error: float) -> str:
    return ".4f" if error < 1e4 else ".4g"


def _signed(change: Difference) -> str:
    if abs(change.value) < 1e4:
        return plus_minus(f"{change.value:+.4f}", change.stderr)
    return plus_minus(f"{change.value:+.3g}", change.stderr, ".2g")
