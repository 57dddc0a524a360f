"""Writes a comparison as text, picture, page and JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mone_megatron.report.compare import (
    Comparison,
    Group,
    RunFigures,
    compared_curves,
)
from mone_megatron.report.formatting import (
    ABSENT,
    format_count,
    format_loss,
    format_ratio,
    format_signed,
    text_table,
)
from mone_megatron.report.page import Curve, Page
from mone_megatron.report.plots import (
    ComparedCurve,
    comparison_figure,
    png_bytes,
    png_data_uri,
)
from mone_megatron.report.stats import Interval, default_span
from mone_megatron.whole_files import json_text, write_whole

PICTURE_FILE = "comparison.png"
PAGE_FILE = "comparison.html"
JSON_FILE = "comparison.json"

NOT_COMPARABLE = "NOT COMPARABLE"
_COMPARABLE = "Comparable: same data, tokens, sequence length, global batch and seeds."
_ALONE = "One run: nothing to compare with."

_RUN_HEADER = (
    "name",
    "train loss",
    "vs first",
    "val loss",
    "tokens",
    "tokens/s",
    "step time",
    "total",
    "activated (gate counted)",
    "activated (neurons only)",
    "status",
)
_GROUP_HEADER = (
    "group",
    "seeds",
    "train loss",
    "vs first, paired",
    "val loss",
    "tokens/s",
    "step seconds",
)
_DEFINITIONS = (
    "train loss: mean of the last 5% of a run's own steps; vs first: the same mean of the "
    "difference, on common steps; val loss: the last; tokens/s and step time: medians, step time "
    "as a ratio to the first run."
)
_GROUP_DEFINITION = (
    "losses: mean ± half-width of the 95% Student-t interval over seeds (none for one seed); "
    "vs first: differences between runs of the same seed; tokens/s and step seconds: mean (lowest "
    "to highest)."
)


def text_report(comparison: Comparison) -> str:
    """Returns the verdict and the tables as plain text, without a newline at the end."""
    parts = [*_verdict_lines(comparison), ""]
    parts.append(text_table(_RUN_HEADER, [_run_cells(f) for f in comparison.figures]))
    parts.append(_DEFINITIONS)
    if comparison.groups:
        parts.append("")
        parts.append(text_table(_GROUP_HEADER, [_group_cells(g) for g in comparison.groups]))
        parts.append(_GROUP_DEFINITION)
    if comparison.config_differences:
        parts.append("")
        parts.append("configuration differs in:")
        parts += [
            f"  {key}: {' | '.join(map(_plain_value, values))}"
            for key, values in comparison.config_differences.items()
        ]
    return "\n".join(parts)


def comparison_json(comparison: Comparison) -> str:
    """Returns all that the tables hold, as JSON text; numbers that are not finite are null."""
    document = {
        "comparable": comparison.comparable,
        "mismatches": [
            {
                "key": mismatch.key,
                "reference": mismatch.reference,
                "reference_value": mismatch.reference_value,
                "run": mismatch.label,
                "value": mismatch.value,
            }
            for mismatch in comparison.mismatches
        ],
        "definitions": [_DEFINITIONS, _GROUP_DEFINITION],
        "runs": [_run_json(figure) for figure in comparison.figures],
        "groups": [_group_json(group) for group in comparison.groups],
        "config_differences": {
            key: list(values) for key, values in comparison.config_differences.items()
        },
    }
    return json_text(document, default=str)


def comparison_picture(comparison: Comparison, curves: Sequence[ComparedCurve]) -> bytes:
    """Returns the content of ``comparison.png``."""
    return png_bytes(comparison_figure(curves, _heading(comparison), _warning(comparison)))


def comparison_page(comparison: Comparison, curves: Sequence[ComparedCurve]) -> str:
    """Returns the text of ``comparison.html``, which is interactive and needs no other file."""
    page = Page(f"Comparison: {_heading(comparison)}")
    page.heading_one(_heading(comparison))
    if not comparison.comparable:
        page.banner("bad", NOT_COMPARABLE, [str(mismatch) for mismatch in comparison.mismatches])
    elif len(comparison.figures) > 1:
        page.banner("good", _COMPARABLE)
    unfinished = [f for f in comparison.figures if f.run.summary.status != "completed"]
    if unfinished:
        page.banner(
            "warn",
            "Not all runs completed.",
            [f"{f.label}: {f.run.summary.status} at step {f.run.last_step}" for f in unfinished],
        )
    page.heading("Runs", _DEFINITIONS)
    page.table(_RUN_HEADER, [_run_cells(figure) for figure in comparison.figures], sortable=True)
    if comparison.groups:
        page.heading("Groups over seeds", _GROUP_DEFINITION)
        page.table(
            _GROUP_HEADER, [_group_cells(group) for group in comparison.groups], sortable=True
        )
    page.heading("Curves")
    _curve_cards(page, comparison, curves)
    page.heading("Configuration differences", "Keys that are not the same in all runs.")
    if comparison.config_differences:
        page.table(
            ("key", *(figure.label for figure in comparison.figures)),
            [
                (key, *map(_plain_value, values))
                for key, values in comparison.config_differences.items()
            ],
        )
    else:
        page.note("None.")
    return page.render()


def write_comparison(
    comparison: Comparison, output: str | Path, *, page_file: str = PAGE_FILE
) -> tuple[Path, Path, Path]:
    """Writes picture, page and JSON into a folder, made if need be, and returns their paths."""
    directory = Path(output)
    curves = compared_curves(comparison)
    return (
        write_whole(directory / PICTURE_FILE, comparison_picture(comparison, curves)),
        write_whole(directory / page_file, comparison_page(comparison, curves)),
        write_whole(directory / JSON_FILE, comparison_json(comparison)),
    )


def _curve_cards(page: Page, comparison: Comparison, curves: Sequence[ComparedCurve]) -> None:
    losses = []
    for index, curve in enumerate(curves):
        dash = index >= 8
        losses.append(
            Curve(curve.loss, curve.label, index, dash=dash, low=curve.low, high=curve.high)
        )
        if curve.validation is not None:
            losses.append(
                Curve(curve.validation, f"{curve.label}, validation", index, kind="points")
            )
    band = " Band: lowest to highest seed." if comparison.groups else ""
    page.chart(
        "Loss",
        losses,
        note=f"Train loss smoothed; nats per token.{band} Drag to zoom in, double-click to zoom "
        "out.",
        height=400,
        wide=True,
    )
    differences = [
        Curve(curve.difference, curve.label, index, dash=index >= 8)
        for index, curve in enumerate(curves)
        if curve.difference is not None
    ]
    if differences:
        page.chart(
            f"Loss minus {curves[0].label}",
            differences,
            note="On common steps, smoothed; below 0 is better than the first.",
            zero=True,
            wide=True,
        )
    picture = comparison_figure(curves, _heading(comparison), _warning(comparison))
    page.raw(
        f'<noscript><img class="static" alt="loss curves" src="{png_data_uri(picture)}"></noscript>'
    )
    span = default_span(max(len(figure.run.series("loss")) for figure in comparison.figures))
    page.open_grid()
    for key, title in (
        ("grad_norm", "Gradient norm, smoothed"),
        ("tokens_per_second", "Tokens per second, smoothed"),
        ("router/load_balancing_loss", "Expert balance loss, smoothed"),
        ("mone/balance_loss", "Neuron balance loss, smoothed"),
    ):
        lines = [
            Curve(figure.run.series(key).smoothed(span), figure.label, index, dash=index >= 8)
            for index, figure in enumerate(comparison.figures)
            if figure.run.has(key)
        ]
        if lines:
            page.chart(title, lines, note=lines[0].name if len(lines) == 1 else "")
    page.close_grid()


def _heading(comparison: Comparison) -> str:
    labels = [group.label for group in comparison.groups]
    labels = labels or [figure.label for figure in comparison.figures]
    return " vs ".join(labels) if len(labels) <= 3 else f"{len(labels)} runs"


def _warning(comparison: Comparison) -> str:
    if comparison.comparable:
        return ""
    keys = list(dict.fromkeys(mismatch.key for mismatch in comparison.mismatches))
    return f"{NOT_COMPARABLE}: {', '.join(keys)} differ"


def _verdict_lines(comparison: Comparison) -> list[str]:
    if comparison.comparable:
        return [_COMPARABLE if len(comparison.figures) > 1 else _ALONE]
    return [NOT_COMPARABLE, *(f"  {mismatch}" for mismatch in comparison.mismatches)]


def _run_cells(figure: RunFigures) -> list[str]:
    parameters = figure.parameters
    how = " measured" if figure.run.summary.measured_parameters else ""
    return [
        figure.label,
        format_loss(figure.train_loss),
        format_signed(figure.loss_difference),
        format_loss(figure.validation_loss),
        format_count(figure.run.tokens),
        format_count(figure.tokens_per_second),
        format_ratio(figure.step_time_ratio),
        format_count(parameters.get("total")),
        format_count(parameters.get("activated_gate_counted")) + how,
        format_count(parameters.get("activated_neurons_only")) + how,
        figure.run.summary.status,
    ]


def _group_cells(group: Group) -> list[str]:
    return [
        group.label,
        str(len(group.members)),
        _interval_text(group.train_loss, format_loss),
        _interval_text(group.loss_difference, format_signed),
        _interval_text(group.validation_loss, format_loss),
        _range_text(group, "tokens_per_second", format_count),
        _range_text(group, "step_seconds", _three_digits),
    ]


def _three_digits(value: float) -> str:
    """Returns three significant digits, zeros too: figures beside each other have the same."""
    return f"{value:#.3g}".rstrip(".")


def _range_text(group: Group, name: str, form: Callable[[float], str]) -> str:
    """Returns the mean of a figure of the machine, and the lowest and highest of the runs.

    Runs on one machine are no sample of machines: an interval of the mean would say nothing.
    """
    values = [getattr(member, name) for member in group.members]
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return ABSENT
    mean, low, high = map(form, (sum(known) / len(known), min(known), max(known)))
    return mean if low == high else f"{mean} ({low} to {high})"


def _interval_text(interval: Interval | None, form: Any) -> str:
    if interval is None:
        return ABSENT
    if math.isnan(interval.half_width):
        return str(form(interval.mean))
    return f"{form(interval.mean)} ± {form(interval.half_width).lstrip('+')}"


def _plain_value(value: Any) -> str:
    if value is None:
        return ABSENT
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def _run_json(figure: RunFigures) -> dict[str, Any]:
    run = figure.run
    return {
        "label": figure.label,
        "name": run.name,
        "path": str(run.path),
        "status": run.summary.status,
        "seed": run.seed,
        "last_step": run.last_step,
        "tokens": run.tokens,
        "final_train_loss": figure.train_loss,
        "final_validation_loss": figure.validation_loss,
        "loss_difference_to_first": figure.loss_difference,
        "tokens_per_second": figure.tokens_per_second,
        "step_seconds": figure.step_seconds,
        "step_time_ratio_to_first": figure.step_time_ratio,
        "parameters": dict(figure.parameters),
        "parameters_measured": bool(run.summary.measured_parameters),
        "data_fingerprint": run.summary.data_fingerprint,
    }


def _group_json(group: Group) -> dict[str, Any]:
    return {
        "label": group.label,
        "runs": [member.label for member in group.members],
        "seeds": list(group.seeds),
        "final_train_loss": _interval_json(group.train_loss),
        "final_validation_loss": _interval_json(group.validation_loss),
        "tokens_per_second": _interval_json(group.tokens_per_second),
        "step_seconds": _interval_json(group.step_seconds),
        "loss_difference_to_first": _interval_json(group.loss_difference),
    }


def _interval_json(interval: Interval | None) -> dict[str, float | None] | None:
    if interval is None:
        return None
    return {
        "mean": interval.mean,
        "low_95": interval.low,
        "high_95": interval.high,
        "count": interval.count,
    }
