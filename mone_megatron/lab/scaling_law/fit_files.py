"""Writes a scaling study as text, JSON and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mone_megatron.lab.scaling_law.figures import (
    allocation_figure,
    fit_figure,
    isoflop_figure,
)
from mone_megatron.lab.scaling_law.holdout import Errors
from mone_megatron.lab.scaling_law.results import (
    AllocationEstimate,
    Estimate,
    IsoFlop,
    Parametric,
    Study,
)
from mone_megatron.report.formatting import ABSENT, format_count, text_table
from mone_megatron.report.identified import NOT_IDENTIFIED, Doubt, mark, reasons
from mone_megatron.report.plots import png_bytes
from mone_megatron.whole_files import json_text, write_whole

JSON_FILE = "scaling_law.json"
# Only some fits have these: those of an earlier one are not to stand beside a new one's.
_OPTIONAL = (
    "coefficients.csv", "fit.png", "predictions.csv", "isoflop.csv", "isoflop.png",
    "allocation.csv", "allocation.png",
)  # fmt: skip
_FORM = "L(N, D) = E + A/N^alpha + B/D^beta"
_NEURON_FORM = "L(N, D, r) = E + A/(N r^gamma)^alpha + B/D^beta"


def text_report(study: Study) -> str:
    """Returns everything found as plain text, without a newline at the end."""
    parts = [*_about(study), *[f"warning: {warning}" for warning in study.warnings]]
    if study.parametric is not None:
        parts += ["", *_parametric_text(study.parametric, study)]
    if study.isoflop is not None:
        parts += ["", *_isoflop_text(study.isoflop, study)]
    allocations = _allocations(study)
    if allocations:
        parts += ["", "compute-optimal allocation", _allocation_table(allocations, study)]
    if study.parametric is not None and study.parametric.predictions:
        parts += ["", "predictions", _prediction_table(study.parametric, study)]
    unknown = {name: one for name, one in study.estimates.items() if not one.identified}
    if unknown:
        parts += ["", f"{NOT_IDENTIFIED}, so do not rely on the value:"]
        parts += [f"  {name}: {reasons(one.doubts)}" for name, one in unknown.items()]
    return "\n".join(parts)


def study_json(study: Study) -> dict[str, Any]:
    """Returns everything found, for machines; numbers that are not finite are null."""
    options = study.options
    return {
        "source": study.table.source,
        "rows": len(study.table),
        "flops": study.table.flops_rule,
        "keep_ratios": list(study.table.ratios),
        "confidence": options.confidence,
        "seed": options.seed,
        "bootstrap": {"kind": options.bootstrap_kind, "resamples": options.resamples},
        "warnings": list(study.warnings),
        "parametric": _parametric_json(study.parametric, study) if study.parametric else None,
        "isoflop": _isoflop_json(study.isoflop) if study.isoflop else None,
        "allocations": [_allocation_json(one) for one in _allocations(study)],
    }


def write_study(study: Study, folder: str | Path) -> list[Path]:
    """Writes JSON, CSV tables and pictures into a folder, and returns their paths.

    What an earlier fit left there is replaced.
    """
    directory = Path(folder)
    files: dict[str, str | bytes] = {
        JSON_FILE: json_text(study_json(study)),
        "points.csv": _csv(*_points(study)),
    }
    if study.parametric is not None:
        files["coefficients.csv"] = _csv(
            ("coefficient", "value", "low", "high", "not_identified"),
            [
                (name, *_cells(estimate), reasons(estimate.doubts))
                for name, estimate in {
                    **study.parametric.coefficients,
                    **(study.parametric.exponents or {}),
                }.items()
            ],
        )
        files["fit.png"] = png_bytes(fit_figure(study.table, study.parametric))
        if study.parametric.predictions:
            files["predictions.csv"] = _csv(
                (
                    *("params", "tokens", "keep_ratio", "loss", "low", "high", "reach"),
                    "not_identified",
                ),
                [
                    (
                        *(p.request.params, p.request.tokens, p.request.ratio, *_cells(p.loss)),
                        *(p.reach, reasons(p.loss.doubts)),
                    )
                    for p in study.parametric.predictions
                ],
            )
    if study.isoflop is not None:
        files["isoflop.csv"] = _csv(
            ("flops", "minimum", "params", "low", "high", "tokens", "loss", "not_identified"),
            [
                (
                    one.flops,
                    one.minimum,
                    *_cells(_minimum(study.isoflop, index)),
                    one.tokens,
                    one.loss,
                    reasons(_minimum(study.isoflop, index).doubts),
                )
                for index, one in enumerate(study.isoflop.fit.parabolas)
            ],
        )
        files["isoflop.png"] = png_bytes(isoflop_figure(study.table, study.isoflop))
    allocations = _allocations(study)
    if allocations:
        files["allocation.csv"] = _csv(
            (
                *("method", "flops", "params", "params_low", "params_high"),
                *("tokens", "tokens_low", "tokens_high", "loss", "loss_low", "loss_high", "reach"),
                "not_identified",
            ),
            [
                (
                    one.method,
                    one.flops,
                    *_cells(one.params),
                    *_cells(one.tokens),
                    *(_cells(one.loss) if one.loss is not None else ("", "", "")),
                    one.reach,
                    reasons(_allocation_doubts(one)),
                )
                for one in allocations
            ],
        )
    if study.isoflop is not None or (study.parametric and study.parametric.fit.law.has_optimum):
        files["allocation.png"] = png_bytes(allocation_figure(study))
    for name in set(_OPTIONAL) - files.keys():
        (directory / name).unlink(missing_ok=True)
    return [write_whole(directory / name, content) for name, content in files.items()]


def _about(study: Study) -> list[str]:
    table = study.table

    def span(values: Any) -> str:
        return f"{format_count(float(values.min()))} to {format_count(float(values.max()))}"

    ratios = f", keep ratio {', '.join(f'{r:g}' for r in table.ratios)}" if table.ratios else ""
    return [
        f"{table.source}: {len(table)} runs of {int(table.points().max()) + 1} points; "
        f"params {span(table.params_R)}, tokens {span(table.tokens_R)}, FLOPs "
        f"{table.flops_R.min():.3g} to {table.flops_R.max():.3g} ({table.flops_rule}){ratios}"
    ]


def _parametric_text(parametric: Parametric, study: Study) -> list[str]:
    fit = parametric.fit
    form = _FORM if fit.law.gamma is None else _NEURON_FORM
    interval = f"{study.options.confidence:.0%} interval"
    rows = [
        [name, f"{one.value:.6g}", _interval(one), mark(one.doubts)]
        for name, one in parametric.coefficients.items()
    ]
    if parametric.exponents is not None:
        rows += [
            [f"{name}: {what} ~ C^{name}", f"{one.value:.4f}", _interval(one), mark(one.doubts)]
            for (name, one), what in zip(
                parametric.exponents.items(), ("N_opt", "D_opt"), strict=True
            )
        ]
    lines = [
        f"{form}, log-Huber with delta {fit.delta:g}: "
        f"objective {fit.objective:.4g}, {fit.at_best} of {fit.starts} starts ended there",
        text_table(["coefficient", "value", interval, ""], rows),
        "",
    ]
    rows = []
    for title, errors in (
        ("in sample", parametric.in_sample),
        (f"largest {_budgets(study.options.holdout_budgets)} held out", parametric.holdout),
        (f"{study.options.folds} folds", parametric.folds),
    ):
        if isinstance(errors, str):
            rows.append([title, ABSENT, ABSENT, ABSENT, ABSENT, f"not available: {errors}"])
        elif errors is not None:
            rows.append([title, *_error_cells(errors), ""])
    lines.append(
        text_table(["error of the loss", "runs", "mean size", "largest", "mean", ""], rows)
    )
    return lines


def _isoflop_text(isoflop: IsoFlop, study: Study) -> list[str]:
    interval = f"{study.options.confidence:.0%} interval of N"
    rows = []
    for index, one in enumerate(isoflop.fit.parabolas):
        estimate = _minimum(isoflop, index)
        rows.append(
            [
                f"{one.flops:.3g}",
                str(len(one.rows_M)),
                format_count(one.params),
                format_count(one.tokens),
                f"{one.loss:.4f}" if math.isfinite(one.loss) else ABSENT,
                one.minimum,
                _count_interval(estimate),
                mark(estimate.doubts),
            ]
        )
    laws = [
        [f"{name}: {what} ~ C^{name}", f"{one.value:.4f}", _interval(one), mark(one.doubts)]
        for (name, one), what in zip(isoflop.exponents.items(), ("N_opt", "D_opt"), strict=True)
    ]
    return [
        f"IsoFLOP parabolas, {len(isoflop.fit.used)} of {len(isoflop.fit.parabolas)} in the laws",
        text_table(["FLOPs", "runs", "N_opt", "D_opt", "loss", "minimum", interval, ""], rows),
        "",
        text_table(["law", "exponent", f"{study.options.confidence:.0%} interval", ""], laws),
    ]


def _allocation_table(allocations: Sequence[AllocationEstimate], study: Study) -> str:
    rows = [
        [
            one.method,
            f"{one.flops:.3g}",
            format_count(one.params.value),
            _count_interval(one.params),
            format_count(one.tokens.value),
            _count_interval(one.tokens),
            f"{one.tokens.value / one.params.value:.1f}",
            f"{one.loss.value:.4f}" if one.loss is not None else ABSENT,
            _interval(one.loss) if one.loss is not None else ABSENT,
            _remarks(_reach(one.reach, "FLOPs"), _allocation_doubts(one)),
        ]
        for one in allocations
    ]
    interval = f"{study.options.confidence:.0%} interval"
    return text_table(
        ["method", "FLOPs", "N", interval, "D", interval, "D/N", "loss", interval, ""], rows
    )


def _prediction_table(parametric: Parametric, study: Study) -> str:
    with_ratio = parametric.fit.law.gamma is not None
    rows = [
        [
            format_count(one.request.params),
            format_count(one.request.tokens),
            *([f"{one.request.ratio:g}"] if with_ratio else []),
            f"{one.loss.value:.4f}",
            _interval(one.loss),
            _remarks(_reach(one.reach, "N or D"), one.loss.doubts),
        ]
        for one in parametric.predictions
    ]
    interval = f"{study.options.confidence:.0%} interval"
    return text_table(["N", "D", *(["r"] if with_ratio else []), "loss", interval, ""], rows)


def _budgets(count: int) -> str:
    return "budget" if count == 1 else f"{count} budgets"


def _reach(reach: float, what: str) -> str:
    return f"extrapolated: {reach:.3g} x the largest {what}" if reach > 1 + 1e-9 else ""


def _remarks(reach: str, doubts: Sequence[Doubt]) -> str:
    return ", ".join(filter(None, (mark(doubts), reach)))


def _allocation_doubts(one: AllocationEstimate) -> list[Doubt]:
    """Returns the doubts of all numbers of an allocation, each once."""
    return list(dict.fromkeys(doubt for part in one.estimates.values() for doubt in part.doubts))


def _interval(estimate: Estimate) -> str:
    if estimate.interval is None:
        return ABSENT
    return f"{estimate.interval.low:.5g} to {estimate.interval.high:.5g}"


def _count_interval(estimate: Estimate) -> str:
    if estimate.interval is None:
        return ABSENT
    return f"{format_count(estimate.interval.low)} to {format_count(estimate.interval.high)}"


def _error_cells(errors: Errors) -> list[str]:
    return [
        str(len(errors.rows_R)),
        f"{errors.mean_absolute:.3%}",
        f"{errors.largest:.3%}",
        f"{errors.bias:+.3%}",
    ]


def _minimum(isoflop: IsoFlop, index: int) -> Estimate:
    """Returns the minimum of a parabola: as it is used, or with why it is not."""
    parabola = isoflop.fit.parabolas[index]
    for used, estimate in isoflop.minima:
        if used is parabola:
            return estimate
    why = "there is none" if parabola.minimum == "none" else "it is outside the sizes tried"
    return Estimate(parabola.params, None, (Doubt("bound", f"{why}, and in no law"),))


def _allocations(study: Study) -> list[AllocationEstimate]:
    return [
        *(study.parametric.allocations if study.parametric else ()),
        *(study.isoflop.allocations if study.isoflop else ()),
    ]


def _points(study: Study) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """Returns header and rows of points.csv, which is a table that can be fitted again."""
    table = study.table
    header = ["run", "params", "tokens", "loss", "flops"]
    columns: list[Any] = [
        table.names, table.params_R, table.tokens_R, table.loss_R, table.flops_R,
    ]  # fmt: skip
    if table.ratio_R is not None:
        header.append("keep_ratio")
        columns.append(table.ratio_R)
    if study.parametric is not None:
        header.append("fitted")
        columns.append(study.parametric.in_sample.predicted_R)
        for name, errors in (
            ("held_out", study.parametric.holdout),
            ("held_out_folds", study.parametric.folds),
        ):
            if isinstance(errors, Errors):
                predicted_R = np.full(len(table), np.nan)
                predicted_R[errors.rows_R] = errors.predicted_R
                header.append(name)
                columns.append(predicted_R)
    return tuple(header), list(zip(*columns, strict=True))


def _csv(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([[_cell(value) for value in row] for row in rows])
    return buffer.getvalue()


def _cell(value: Any) -> str:
    """Returns a number as text that reads back as itself; "" for one that is not finite."""
    if isinstance(value, float):
        return repr(float(value)) if math.isfinite(value) else ""
    return str(value)


def _cells(estimate: Estimate) -> tuple[float | str, float | str, float | str]:
    if estimate.interval is None:
        return estimate.value, "", ""
    return estimate.value, estimate.interval.low, estimate.interval.high


def _estimate_json(estimate: Estimate) -> dict[str, Any]:
    return {
        "value": estimate.value,
        "low": None if estimate.interval is None else estimate.interval.low,
        "high": None if estimate.interval is None else estimate.interval.high,
        "identified": estimate.identified,
        "doubts": [{"kind": doubt.kind, "reason": doubt.reason} for doubt in estimate.doubts],
    }


def _errors_json(errors: Errors | str | None) -> dict[str, Any] | None:
    if errors is None:
        return None
    if isinstance(errors, str):
        return {"not_available": errors}
    return {
        "runs": len(errors.rows_R),
        "mean_absolute": errors.mean_absolute,
        "largest": errors.largest,
        "mean": errors.bias,
    }


def _parametric_json(parametric: Parametric, study: Study) -> dict[str, Any]:
    fit = parametric.fit
    return {
        "form": _FORM if fit.law.gamma is None else _NEURON_FORM,
        "delta": fit.delta,
        "objective": fit.objective,
        "starts": fit.starts,
        "starts_at_best": fit.at_best,
        "coefficients": {
            name: _estimate_json(one) for name, one in parametric.coefficients.items()
        },
        "exponents": None
        if parametric.exponents is None
        else {name: _estimate_json(one) for name, one in parametric.exponents.items()},
        "flops_per_param_token": parametric.flops_per_param_token,
        "relative_errors": {
            "in_sample": _errors_json(parametric.in_sample),
            "held_out_budgets": _errors_json(parametric.holdout),
            "held_out_folds": _errors_json(parametric.folds),
        },
        "predictions": [
            {
                "params": one.request.params,
                "tokens": one.request.tokens,
                "keep_ratio": one.request.ratio,
                "loss": _estimate_json(one.loss),
                "reach": one.reach,
            }
            for one in parametric.predictions
        ],
        "redrawn_resamples": None if parametric.samples is None else parametric.samples.redrawn,
    }


def _isoflop_json(isoflop: IsoFlop) -> dict[str, Any]:
    return {
        "budgets": [
            {
                "flops": one.flops,
                "runs": len(one.rows_M),
                "minimum": one.minimum,
                "used": any(one is used for used in isoflop.fit.used),
                "params": _estimate_json(_minimum(isoflop, index)),
                "tokens": one.tokens,
                "loss": one.loss,
                "center_log_params": one.center,
                "coefficients": list(one.coefficients),
            }
            for index, one in enumerate(isoflop.fit.parabolas)
        ],
        "left_out": list(isoflop.fit.left_out),
        "exponents": {name: _estimate_json(one) for name, one in isoflop.exponents.items()},
        "log_coefficients": {
            "a": isoflop.fit.params.log_coefficient,
            "b": isoflop.fit.tokens.log_coefficient,
        },
    }


def _allocation_json(one: AllocationEstimate) -> dict[str, Any]:
    return {
        "method": one.method,
        "flops": one.flops,
        "params": _estimate_json(one.params),
        "tokens": _estimate_json(one.tokens),
        "loss": None if one.loss is None else _estimate_json(one.loss),
        "reach": one.reach,
    }
