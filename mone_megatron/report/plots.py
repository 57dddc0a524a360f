"""Draws static pictures of runs. Figures are built without pyplot, so nothing global is touched."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from mone_megatron.report.formatting import format_count, format_loss
from mone_megatron.report.runs import Run, Series, load_run
from mone_megatron.report.stats import FloatArray
from mone_megatron.whole_files import write_whole

LOSS_PLOT_FILE = "loss.png"

# The light palette of the pages, so that a run keeps its colour between picture and page.
COLORS = (
    "#1f6fb4", "#d1571a", "#16875f", "#a63d8f", "#b8860b", "#5b5bd6", "#0e8a9b", "#8a5a44",
)  # fmt: skip
_INK, _SOFT, _GRID = "#1b1f24", "#5c6673", "#e3e7ec"
_LINE_STYLES = ("-", "--", ":", "-.")
_MARKERS = ("D", "s", "^", "v")
# Beyond this many curves a legend beside the plot would squeeze the plot itself.
_MAX_LEGEND_ROWS = 24
_SMOOTHED = "smoothed train loss; dots are validation"


def color_of(index: int) -> str:
    """Returns the colour of the index-th run; colours repeat after eight."""
    return COLORS[index % len(COLORS)]


def line_style_of(index: int) -> str:
    """Returns the line style of the index-th run, which changes when the colours start over."""
    return _LINE_STYLES[index // len(COLORS) % len(_LINE_STYLES)]


def marker_of(index: int) -> str:
    """Returns the marker of the index-th run, which changes when the colours start over."""
    return _MARKERS[index // len(COLORS) % len(_MARKERS)]


def loss_figure(run: Run) -> Figure:
    """Draws train and validation loss over a small learning-rate panel, 1200 by 700 pixels."""
    figure = new_figure()
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[4.2, 1])
    loss = run.series("loss")
    smooth = loss.smoothed()
    top.plot(loss.steps, loss.values, color=COLORS[0], alpha=0.28, linewidth=0.9, label="train")
    top.plot(
        smooth.steps,
        smooth.values,
        color=COLORS[0],
        linewidth=2.2,
        marker="o" if len(loss) == 1 else "",
        label="train, smoothed",
    )
    if run.has("val_loss"):
        validation = run.series("val_loss")
        top.plot(
            validation.steps,
            validation.values,
            color=COLORS[1],
            linestyle="none",
            marker="o",
            markersize=_dot_size(validation),
            markeredgecolor="white",
            markeredgewidth=1,
            label="validation",
            zorder=3,
        )
    style_axes(top)
    _limit_losses(top, [loss, *([run.series("val_loss")] if run.has("val_loss") else [])])
    top.set_ylabel("loss (nats per token)")
    top.legend(frameon=False, fontsize=13, labelcolor=_INK, loc="upper right")
    finals = f"final train {format_loss(run.final_train_loss)}"
    if run.final_validation_loss is not None:
        finals += f"    final validation {format_loss(run.final_validation_loss)}"
    if run.summary.status != "completed":
        finals += f"    ({run.summary.status} at step {run.last_step})"
    title_axes(top, run.name, f"{parameter_line(run)}    {finals}")

    if run.has("lr"):
        rate = run.series("lr")
        bottom.plot(rate.steps, rate.values, color=COLORS[2], linewidth=1.8)
        finite = rate.values[np.isfinite(rate.values)]
        if len(finite) and finite.max() > 0:
            bottom.set_ylim(0, 1.15 * float(finite.max()))
    else:
        bottom.text(0.5, 0.5, "no learning rate recorded", color=_SOFT, ha="center", va="center",
                    transform=bottom.transAxes)  # fmt: skip
    style_axes(bottom)
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    bottom.yaxis.get_offset_text().set(fontsize=11, color=_SOFT)
    bottom.set_ylabel("lr")
    bottom.set_xlabel("step")
    bottom.locator_params(axis="y", nbins=3)
    figure.align_ylabels([top, bottom])
    return figure


@dataclass(frozen=True)
class ComparedCurve:
    """Holds one run, or the mean of a group of replicates, in a comparison.

    Attributes:
        label: legend text.
        loss: smoothed train loss.
        low, high: ``[n]`` lowest and highest replicate at the steps of `loss`; None for one run.
        validation: validation loss; None when never evaluated.
        difference: smoothed loss minus the first curve's on their common steps; None for the first
            curve and where no step is common.
    """

    label: str
    loss: Series
    low: FloatArray | None
    high: FloatArray | None
    validation: Series | None
    difference: Series | None


def comparison_figure(curves: Sequence[ComparedCurve], heading: str, warning: str = "") -> Figure:
    """Draws overlaid loss curves over their difference to the first one.

    Args:
        curves: the first is the reference of the differences.
        heading: title.
        warning: a red line under the title; "" for none.
    """
    figure = new_figure()
    if not any(curve.difference is not None for curve in curves):
        axes = figure.subplots(1, 1)
        _draw_losses(axes, curves)
        title_axes(axes, heading, warning or _SMOOTHED, bool(warning))
        axes.set_xlabel("step")
        return figure
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[2.6, 1])
    _draw_losses(top, curves)
    title_axes(top, heading, warning or _SMOOTHED, bool(warning))
    _draw_differences(bottom, curves)
    bottom.set_xlabel("step")
    figure.align_ylabels([top, bottom])
    return figure


def _draw_losses(axes: Axes, curves: Sequence[ComparedCurve]) -> None:
    for index, curve in enumerate(curves):
        color = color_of(index)
        axes.plot(
            curve.loss.steps,
            curve.loss.values,
            color=color,
            linestyle=line_style_of(index),
            linewidth=2,
            marker="o" if len(curve.loss) == 1 else "",
            label=_plain(curve.label),
        )
        if curve.low is not None and curve.high is not None:
            axes.fill_between(
                curve.loss.steps, curve.low, curve.high, color=color, alpha=0.18, linewidth=0
            )
        if curve.validation is not None:
            axes.plot(
                curve.validation.steps,
                curve.validation.values,
                color=color,
                linestyle="none",
                marker="o",
                markersize=_dot_size(curve.validation),
                markeredgecolor="white",
                markeredgewidth=1,
                zorder=3,
            )
    style_axes(axes)
    axes.set_ylabel("loss (nats per token)")
    shown = [curve.loss for curve in curves]
    shown += [curve.validation for curve in curves if curve.validation is not None]
    for curve in curves:
        if curve.low is not None and curve.high is not None:
            shown += [Series(curve.loss.steps, edge) for edge in (curve.low, curve.high)]
    _limit_losses(axes, shown)
    if any(curve.validation is not None for curve in curves):
        axes.plot([], [], color=_SOFT, linestyle="none", marker="o", label="validation")
    _add_legend(axes, len(curves))


def _add_legend(axes: Axes, curves: int) -> None:
    """Names so many curves, and what else has a label, as far as there is room."""
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) > _MAX_LEGEND_ROWS:
        handles, labels = handles[:_MAX_LEGEND_ROWS], labels[:_MAX_LEGEND_ROWS]
        labels[-1] = f"... {curves - _MAX_LEGEND_ROWS + 1} more"
    # Beside the plot when it would cover the curves.
    beside = len(handles) > 8
    axes.legend(
        handles,
        labels,
        frameon=False,
        fontsize=11 if beside else 13,
        labelcolor=_INK,
        loc="upper left" if beside else "upper right",
        bbox_to_anchor=(1.0, 1.0) if beside else None,
    )


def _draw_differences(axes: Axes, curves: Sequence[ComparedCurve]) -> None:
    axes.axhline(0, color=color_of(0), linestyle=line_style_of(0), linewidth=1.6)
    settled = []
    for index, curve in enumerate(curves):
        if curve.difference is None:
            continue
        axes.plot(
            curve.difference.steps,
            curve.difference.values,
            color=color_of(index),
            linestyle=line_style_of(index),
            linewidth=1.8,
            marker="o" if len(curve.difference) == 1 else "",
        )
        settled.append(_settled(curve.difference.values))
    style_axes(axes)
    values = np.concatenate(settled)
    finite = values[np.isfinite(values)]
    if len(finite):
        low, high = min(float(finite.min()), 0.0), max(float(finite.max()), 0.0)
        room = 0.12 * (high - low) or 0.01
        axes.set_ylim(low - room, high + room)
    axes.locator_params(axis="y", nbins=5)
    axes.set_ylabel("difference")
    axes.set_title(
        f"loss minus {_plain(_shorten(curves[0].label, 80))}, common steps, smoothed",
        loc="left",
        fontsize=12,
        color=_SOFT,
    )


def png_bytes(figure: Figure) -> bytes:
    """Returns the figure as a PNG file."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def png_data_uri(figure: Figure) -> str:
    """Returns the figure as a ``data:`` address for an ``img`` element."""
    return "data:image/png;base64," + base64.b64encode(png_bytes(figure)).decode("ascii")


def write_loss_plot(run_dir: str | Path) -> Path:
    """Writes ``loss.png`` into the run directory and returns the picture's path.

    Raises:
        ValueError: the directory is not a readable run (:func:`load_run`).
    """
    run = load_run(run_dir)
    return write_whole(run.path / LOSS_PLOT_FILE, png_bytes(loss_figure(run)))


def parameter_line(run: Run) -> str:
    """Returns a line with total and activated parameters, the convention named."""
    parameters = run.parameters
    line = f"{format_count(parameters.get('total'))} parameters"
    if "activated_gate_counted" in parameters:
        line += f", {format_count(parameters['activated_gate_counted'])} activated (gate counted"
        line += ", measured)" if run.summary.measured_parameters else ")"
    return line


def new_figure() -> Figure:
    """Returns an empty figure of 1200 by 700 pixels."""
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.09)
    return Figure(figsize=(12, 7), dpi=100, layout=layout, facecolor="white")


def _dot_size(validation: Series) -> float:
    """Returns a marker size in points that keeps many evaluations apart."""
    return 7.0 if len(validation) <= 30 else 4.0


def _plain(text: str) -> str:
    """Returns text that matplotlib takes for no mathematics, nor hides for its first underscore."""
    text = text.replace("\\", "\\\\").replace("$", r"\$")
    return f"\u200b{text}" if text.startswith("_") else text


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def title_axes(axes: Axes, heading: str, line: str, warn: bool = False) -> None:
    """Puts a heading over the axes, and a quiet line under it, red when it warns."""
    axes.set_title(
        _plain(_shorten(heading, 90)),
        loc="left",
        fontsize=18,
        fontweight="bold",
        color=_INK,
        pad=32,
    )
    axes.annotate(
        _plain(_shorten(line, 150)),
        xy=(0, 1),
        xytext=(0, 11),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=12.5,
        color="#b3261e" if warn else _SOFT,
    )


def style_axes(axes: Axes) -> None:
    """Sets grid, spines and ticks of our pictures, for axes that count whole steps along x."""
    axes.grid(True, color=_GRID, linewidth=0.9)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#c4cbd4")
    axes.tick_params(colors=_SOFT, labelsize=12)
    axes.xaxis.label.set(fontsize=13, color=_INK)
    axes.yaxis.label.set(fontsize=13, color=_INK)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.margins(x=0.015)


def _settled(values: FloatArray) -> FloatArray:
    """Returns the values after the first 2%, where a loss has not come down from its start yet."""
    return values[len(values) // 50 :]


def _limit_losses(axes: Axes, series: Sequence[Series]) -> None:
    """Sets vertical limits from the finite values: room for the fall from the start, not for a
    spike.
    """
    values = np.concatenate([one.values for one in series])
    values = values[np.isfinite(values)]
    if not len(values):
        axes.text(0.5, 0.5, "no finite loss", fontsize=16, color=_SOFT, ha="center", va="center",
                  transform=axes.transAxes)  # fmt: skip
        return
    low = float(values.min())
    starts = [one.values[0] for one in series if len(one) and math.isfinite(one.values[0])]
    high = float(max(np.quantile(values, 0.995), *starts, low))
    room = 0.05 * (high - low) or 0.05 * abs(low) or 0.05
    axes.set_ylim(low - room, high + room)
