"""Draws a scaling study: the fit and its errors, the parabolas, where a budget goes.

Legend: R rows (runs), G points of a curve.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from mone_megatron.lab.scaling_law.bootstrap import bounds
from mone_megatron.lab.scaling_law.holdout import Errors
from mone_megatron.lab.scaling_law.results import Estimate, IsoFlop, Parametric, Study
from mone_megatron.lab.scaling_law.table import Table
from mone_megatron.report.identified import NOT_IDENTIFIED
from mone_megatron.report.plots import color_of, new_figure, style_axes, title_axes
from mone_megatron.report.stats import FloatArray

_CURVE_POINTS = 60
# How far beyond the table the allocation picture looks, in budgets.
_LOOK_AHEAD = 30.0
_COLOR_MAP = "viridis"
# Behind a number that is not identified.
_QUESTION = " (?)"


def fit_figure(table: Table, parametric: Parametric) -> Figure:
    """Draws fitted over measured losses, and relative errors, also of held-out runs, over FLOPs."""
    figure = new_figure()
    left, right = figure.subplots(1, 2)
    errors = parametric.in_sample
    style_axes(left)
    dots = left.scatter(
        errors.measured_R,
        errors.predicted_R,
        c=np.log10(table.flops_R),
        cmap=_COLOR_MAP,
        s=46,
        edgecolor="white",
        linewidth=0.7,
        zorder=3,
    )
    both = np.concatenate([errors.measured_R, errors.predicted_R])
    ends = [float(both.min()), float(both.max())]
    left.plot(ends, ends, color="#5c6673", linewidth=1.2, zorder=2)
    left.set_xlabel("measured loss (nats per token)")
    left.set_ylabel("fitted loss")
    figure.colorbar(dots, ax=left, label="log10 FLOPs", pad=0.02)
    # In the corner that a good fit leaves empty; a long line under the title would push the axes.
    left.text(
        0.96,
        0.05,
        "\n".join(
            f"{name} {one.value:.4g}{_QUESTION if one.doubts else ''}"
            for name, one in parametric.coefficients.items()
        ),
        transform=left.transAxes,
        ha="right",
        fontsize=13,
        linespacing=1.5,
    )
    doubtful = any(one.doubts for one in parametric.coefficients.values())
    title_axes(
        left,
        "Scaling law",
        f"{len(table)} runs, coloured by FLOPs" + (f";{_QUESTION}: {NOT_IDENTIFIED}" * doubtful),
    )

    style_axes(right)
    right.set_xscale("log")
    shown: list[tuple[str, Errors | str | None, str, str]] = [
        ("in sample", errors, "o", color_of(0)),
        ("folds", parametric.folds, "x", color_of(2)),
        ("largest budgets", parametric.holdout, "D", color_of(1)),
    ]
    for label, found, marker, color in shown:
        if isinstance(found, Errors):
            right.plot(
                table.flops_R[found.rows_R],
                100 * found.relative_R,
                linestyle="none",
                marker=marker,
                markersize=6,
                color=color,
                label=label,
            )
    right.axhline(0, color="#5c6673", linewidth=1.2)
    right.set_xlabel("training FLOPs")
    right.set_ylabel("relative error of the loss (percent)")
    # Room for the legend above the dots.
    low, high = right.get_ylim()
    right.set_ylim(low, high + 0.2 * (high - low))
    right.legend(
        frameon=False, fontsize=12, loc="upper left", ncols=3, columnspacing=1, handletextpad=0.3
    )
    return figure


def isoflop_figure(table: Table, isoflop: IsoFlop) -> Figure:
    """Draws losses over parameters, one colour a budget, with parabolas and their minima."""
    figure = new_figure()
    axes = figure.subplots(1, 1)
    style_axes(axes)
    axes.set_xscale("log")
    parabolas = isoflop.fit.parabolas
    colors = _shades(len(parabolas))
    for parabola, color in zip(parabolas, colors, strict=True):
        params_M = table.params_R[parabola.rows_M]
        axes.plot(
            params_M,
            table.loss_R[parabola.rows_M],
            linestyle="none",
            marker="o",
            color=color,
            label=f"{parabola.flops:.3g}",
        )
        curve_G = np.geomspace(params_M.min(), params_M.max(), _CURVE_POINTS)
        axes.plot(curve_G, parabola.loss_at(curve_G), color=color, linewidth=1.6)
        estimates = [one for used, one in isoflop.minima if used is parabola]
        for estimate in estimates:
            axes.plot(
                [parabola.params],
                [parabola.loss],
                marker="*",
                markersize=16,
                # Hollow where the minimum is not identified.
                color=color if estimate.identified else "white",
                markeredgecolor="#1b1f24",
                linestyle="none",
                zorder=4,
            )
    axes.set_xlabel("parameters")
    axes.set_ylabel("loss (nats per token)")
    axes.legend(
        title="FLOPs", frameon=False, fontsize=11, loc="upper left", bbox_to_anchor=(1.0, 1.0)
    )
    a, b = (
        f"{one.value:.3f}{_QUESTION if one.doubts else ''}"
        for one in (isoflop.exponents["a"], isoflop.exponents["b"])
    )
    doubtful = any(
        one.doubts for one in (*isoflop.exponents.values(), *(one for _, one in isoflop.minima))
    )
    title_axes(
        axes,
        "IsoFLOP profiles",
        f"stars: minima in the laws N_opt ~ C^{a}, D_opt ~ C^{b}"
        + (f"; hollow or{_QUESTION}: {NOT_IDENTIFIED}" * doubtful),
    )
    return figure


def allocation_figure(study: Study) -> Figure:
    """Draws compute-optimal parameters and tokens over the budget.

    They are drawn by each method, with intervals.
    """
    table = study.table
    figure = new_figure()
    left, right = figure.subplots(1, 2)
    flops_G = np.geomspace(
        float(table.flops_R.min()), _LOOK_AHEAD * float(table.flops_R.max()), _CURVE_POINTS
    )
    for axes, part, label in ((left, "params", "parameters"), (right, "tokens", "tokens")):
        style_axes(axes)
        axes.set_xscale("log")
        axes.set_yscale("log")
        if study.parametric is not None and study.parametric.fit.law.has_optimum:
            _parametric_curve(axes, study, study.parametric, part, flops_G)
        if study.isoflop is not None:
            _isoflop_curve(axes, study, study.isoflop, part, flops_G)
        axes.axvline(float(table.flops_R.max()), color="#5c6673", linewidth=1, linestyle=":")
        axes.set_xlabel("training FLOPs")
        axes.set_ylabel(f"optimal {label}")
        axes.legend(frameon=False, fontsize=12, loc="upper left")
    title_axes(left, "Compute-optimal allocation", "dotted: the largest run of the table")
    return figure


def _parametric_curve(
    axes: Axes, study: Study, parametric: Parametric, part: str, flops_G: FloatArray
) -> None:
    def values(law_index: int | None) -> FloatArray:
        law = parametric.fit.law
        if law_index is not None:
            assert parametric.samples is not None
            law = parametric.samples.laws[law_index]
        if not law.has_optimum:
            return np.full(len(flops_G), np.nan)
        best = [
            law.optimum(flops, parametric.flops_per_param_token, study.options.keep_ratio)
            for flops in flops_G.tolist()
        ]
        return np.array([one.params if part == "params" else one.tokens for one in best])

    label = _law_label("parametric", parametric.exponents)
    axes.plot(flops_G, values(None), color=color_of(0), linewidth=2, label=label)
    if parametric.samples is not None:
        rows = np.stack([values(index) for index in range(len(parametric.samples.laws))])
        _band(axes, flops_G, rows, study.options.confidence, color_of(0))


def _isoflop_curve(
    axes: Axes, study: Study, isoflop: IsoFlop, part: str, flops_G: FloatArray
) -> None:
    index = 0 if part == "params" else 1
    law = (isoflop.fit.params, isoflop.fit.tokens)[index]
    line_G = [law.at(flops) for flops in flops_G.tolist()]
    label = _law_label("IsoFLOP", isoflop.exponents)
    axes.plot(flops_G, line_G, color=color_of(1), linewidth=2, linestyle="--", label=label)
    axes.plot(
        [one.flops for one in isoflop.fit.used],
        [one.params if part == "params" else one.tokens for one in isoflop.fit.used],
        linestyle="none",
        marker="*",
        markersize=13,
        color=color_of(1),
        label="minima",
    )
    if isoflop.samples is not None and isoflop.samples.laws:
        rows = np.stack(
            [
                np.array([laws[index].at(flops) for flops in flops_G.tolist()])
                for laws in isoflop.samples.laws
            ]
        )
        _band(axes, flops_G, rows, study.options.confidence, color_of(1))


def _law_label(name: str, exponents: Mapping[str, Estimate] | None) -> str:
    doubtful = any(one.doubts for one in (exponents or {}).values())
    return f"{name} ({NOT_IDENTIFIED})" if doubtful else name


def _band(axes: Axes, flops_G: FloatArray, rows: FloatArray, confidence: float, color: str) -> None:
    found = [bounds(column, confidence) for column in rows.T]
    if all(one is not None for one in found):
        low = [one.low for one in found if one is not None]
        high = [one.high for one in found if one is not None]
        axes.fill_between(flops_G, low, high, color=color, alpha=0.16, linewidth=0)


def _shades(count: int) -> list[str]:
    """Returns colours from dark to light, one a budget, told apart in grey too."""
    return [to_hex(colormaps[_COLOR_MAP](share)) for share in np.linspace(0, 0.9, max(count, 1))]
