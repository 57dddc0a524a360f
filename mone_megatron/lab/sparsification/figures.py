"""Draws pictures of sparsification studies, without pyplot."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator, MaxNLocator, PercentFormatter

from mone_megatron.evaluation.estimates import Difference
from mone_megatron.lab.sparsification.findings import (
    BudgetResult,
    Granularity,
    Point,
    Study,
    granularity,
)
from mone_megatron.lab.sparsification.plans import RANK
from mone_megatron.lab.sparsification.statistics import LayerStatistics
from mone_megatron.report.formatting import plus_minus
from mone_megatron.report.plots import (
    color_of,
    line_style_of,
    new_figure,
    style_axes,
    title_axes,
)

# Layers of the pictures that have a line for each: from the first to the last.
_LAYER_COLORS = colormaps["viridis"]
# Room above the curves that a loss figure is about, in parts of their height.
_ROOM = 0.08
# Rises of the loss below are noise.
_LOWEST_RISE = 1e-4
_SHARE_LABEL = "neurons pruned of each token and expert"
_LINE: dict[str, Any] = {"marker": "o", "markersize": 4.5, "linewidth": 2}


def figures(studies: Sequence[Study]) -> Iterator[tuple[str, Figure]]:
    """Yields every picture with the name of its file."""
    yield "sparsification.png", loss_figure(studies)
    if any(_relative(study.dense, study.dense) for study in studies):
        yield "relative.png", relative_figure(studies)
    if any(study.statistics for study in studies):
        yield "thresholds.png", threshold_figure(studies)
    for name, study in zip(file_names([study.label for study in studies]), studies, strict=True):
        yield f"rise_{name}.png", rise_figure(study)
        if len(_lines(study)) > 1:
            yield f"scores_{name}.png", scores_figure(study)
        if study.statistics:
            yield f"activations_{name}.png", activation_figure(study)
            yield f"mass_{name}.png", mass_figure(study)
        if study.budget is not None:
            yield f"budget_{name}.png", budget_figure(study, study.budget)
        if study.removals:
            yield f"granularity_{name}.png", granularity_figure(study)


def file_names(labels: Sequence[str]) -> list[str]:
    """Returns a part of a file's name for each label, numbered where two would share one."""
    names = [re.sub(r"[^\w.-]+", "_", label) for label in labels]
    if len(set(names)) < len(names):
        names = [f"{number}_{name}" for number, name in enumerate(names, start=1)]
    return names


def loss_figure(studies: Sequence[Study]) -> Figure:
    """Draws every model's loss over the share pruned by the first score: the paper's figure."""
    curves = [(study.label, _curve(study, _lines(study)[0])) for study in studies]
    figure = _losses(curves, [_loss(point) for _, curve in curves for point in curve])
    title_axes(
        figure.axes[0],
        f"loss over the share of neurons pruned by {_name(_lines(studies[0])[0])}",
        "no weight is changed; bands: 2 standard errors of the difference to the model as it is",
    )
    return figure


def scores_figure(study: Study) -> Figure:
    """Draws the loss of one model over the share pruned by each score."""
    curves = [(_name(line), _curve(study, line)) for line in _lines(study)]
    figure = _losses(curves, [_loss(point) for point in curves[0][1]])
    title_axes(
        figure.axes[0],
        f"loss of {study.label} by the score that neurons are ranked by",
        f"bands: 2 standard errors; the frame is that of {curves[0][0]}",
    )
    return figure


def rise_figure(study: Study) -> Figure:
    """Draws how much the loss of a model rises, on a logarithmic scale, where it rises at all."""
    figure = new_figure()
    axes = figure.subplots()
    for index, line in enumerate(_lines(study)):
        curve = _curve(study, line)
        rises = np.array([_rise(point).value for point in curve])
        # A gap, not a line to somewhere below.
        seen = np.where(rises > _LOWEST_RISE, rises, np.nan)
        axes.plot([_share(point) for point in curve], seen, color=color_of(index),
                  label=_name(line), **_LINE)  # fmt: skip
    _finish(axes, _SHARE_LABEL, percent_x=True)
    axes.set_xlim(0, 1)
    axes.set_yscale("log")
    axes.set_ylim(bottom=_LOWEST_RISE)
    if not any(np.isfinite(line.get_ydata()).any() for line in axes.get_lines()):
        axes.text(0.5, 0.5, f"no rise above {_LOWEST_RISE:g}", ha="center", color="#5c6673",
                  transform=axes.transAxes, fontsize=13)  # fmt: skip
    axes.set_ylabel("rise of the loss (nats per token)")
    axes.legend(frameon=False, fontsize=12, loc="upper left", bbox_to_anchor=(1, 1))
    title_axes(
        axes,
        f"rise of the loss of {study.label}",
        f"to the model as it is; rises below {_LOWEST_RISE:g} and falls are not shown",
    )
    return figure


def relative_figure(studies: Sequence[Study]) -> Figure:
    """Draws the mean over tasks of the score, as a part of the unpruned model's."""
    figure = new_figure()
    axes = figure.subplots()
    for index, study in enumerate(studies):
        curve = _curve(study, _lines(study)[0])
        parts = [_relative(point, study.dense) for point in curve]
        shown = [part for part in parts if part is not None]
        if shown:
            axes.plot([_share(point) for point in curve], shown, color=color_of(index),
                      label=study.label, **_LINE)  # fmt: skip
    axes.axhline(0.95, color="#5c6673", linewidth=1, linestyle=":")
    _finish(axes, _SHARE_LABEL, percent_x=True)
    axes.set_xlim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylabel("score, of the unpruned model's")
    axes.legend(frameon=False, fontsize=12, loc="lower left")
    title_axes(
        axes,
        f"task scores over the share of neurons pruned by {_name(_lines(studies[0])[0])}",
        "mean over tasks and metrics that are better when higher; dotted: 95%",
    )
    return figure


def granularity_figure(study: Study) -> Figure:
    """Draws the rise of the loss over the share that goes, and over what a token still needs."""
    figure = new_figure()
    panels = figure.subplots(1, 2, sharey=True)
    by_name: dict[str, list[Granularity]] = {}
    for row in granularity(study):
        by_name.setdefault(row.name, []).append(row)
    for index, (name, rows) in enumerate(by_name.items()):
        rises = np.array([row.change.value for row in rows])
        # A gap, not a line to somewhere below.
        seen = np.where(rises > _LOWEST_RISE, rises, np.nan)
        for axes, places in zip(
            panels,
            ([row.share for row in rows], [row.activated for row in rows]),
            strict=True,
        ):
            axes.plot(places, seen, color=color_of(index), linestyle=line_style_of(index),
                      label=name, **_LINE)  # fmt: skip
    names = ("share that is to go", "experts' parameters that a token needs")
    for axes, name in zip(panels, names, strict=True):
        _finish(axes, name, percent_x=True)
        axes.set_xlim(0, 1.02)
        axes.set_yscale("log")
        axes.set_ylim(bottom=_LOWEST_RISE)
    panels[0].set_ylabel("rise of the loss (nats per token)")
    panels[1].legend(frameon=False, fontsize=11, loc="upper left", bbox_to_anchor=(1, 1))
    title_axes(
        panels[0],
        f"experts and neurons that {study.label} can do without",
        f"rises below {_LOWEST_RISE:g} and falls are not shown",
    )
    return figure


def _losses(curves: Sequence[tuple[str, list[Point]]], framed: Sequence[float]) -> Figure:
    """Draws losses with bands, in a frame that holds the finite ones of ``framed``."""
    figure = new_figure()
    axes = figure.subplots()
    for index, (label, curve) in enumerate(curves):
        shares, color = [_share(point) for point in curve], color_of(index)
        losses = np.array([_loss(point) for point in curve])
        spread = 2 * np.array([_rise(point).stderr for point in curve])
        axes.plot(shares, losses, color=color, label=label, **_LINE)
        axes.fill_between(shares, losses - spread, losses + spread, color=color, alpha=0.18, lw=0)
    _finish(axes, _SHARE_LABEL, percent_x=True)
    axes.set_xlim(0, 1)
    finite = [loss for loss in framed if np.isfinite(loss)]
    if finite:
        room = _ROOM * (max(finite) - min(finite)) or 0.05
        axes.set_ylim(min(finite) - room, max(finite) + room)
    # Losses, not what is to be added to a number at the top.
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.set_ylabel("loss (nats per token)")
    axes.legend(frameon=False, fontsize=12, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def threshold_figure(studies: Sequence[Study]) -> Figure:
    """Draws, per layer, the |a| above which the largest share of activations lies."""
    figure = new_figure()
    axes = figure.subplots()
    index = 0
    for study in studies:
        for target in dict.fromkeys(entry.target for entry in study.statistics):
            rows = [entry for entry in study.statistics if entry.target == target]
            for at, threshold in enumerate(rows[0].thresholds):
                axes.plot(
                    [entry.layer for entry in rows],
                    [entry.thresholds[at].pooled for entry in rows],
                    color=color_of(index),
                    linestyle=line_style_of(index),
                    label=f"{study.label}, {target}, top {threshold.top:.0%}",
                    **_LINE,
                )
                index += 1
    _finish(axes, "layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)
    axes.set_ylabel("threshold of |a|")
    axes.legend(frameon=False, fontsize=12)
    title_axes(axes, "thresholds of |a|", "over all tokens, experts and neurons of a layer")
    return figure


def activation_figure(study: Study) -> Figure:
    """Draws how often |a| has which magnitude, a line for each layer."""
    figure = new_figure()
    axes = figure.subplots()
    for entry in study.statistics:
        edges = np.array(entry.edges)
        counts = np.array(entry.positive) + np.array(entry.negative)
        density = counts / counts.sum() / np.diff(np.log10(edges))
        axes.stairs(density, edges, color=_color(study, entry.layer), linewidth=1.6)
    negative = sum(sum(entry.negative) for entry in study.statistics)
    total = sum(entry.rows * entry.neurons for entry in study.statistics)
    _finish(axes, "|a|")
    axes.set_xscale("log")
    axes.set_xlim(left=min(_visible(entry) for entry in study.statistics))
    axes.set_ylabel("share per decade")
    _color_bar(figure, axes, study)
    title_axes(axes, f"activations of {study.label}", f"{negative / total:.0%} are negative")
    return figure


def _visible(entry: LayerStatistics) -> float:
    """Returns the magnitude that a thousandth of the activations is below."""
    counts = np.array(entry.positive) + np.array(entry.negative)
    return entry.edges[int(np.searchsorted(np.cumsum(counts), counts.sum() / 1000))]


def mass_figure(study: Study) -> Figure:
    """Draws the part of a token's sum of |a| in its largest neurons, a line for each layer."""
    figure = new_figure()
    axes = figure.subplots()
    for entry in study.statistics:
        axes.plot((0.0, *entry.ranks), (0.0, *entry.mass), color=_color(study, entry.layer),
                  linewidth=1.8)  # fmt: skip
    axes.plot((0, 1), (0, 1), color="#5c6673", linewidth=1, linestyle=":")
    _finish(axes, "largest neurons of each token and expert", percent_x=True)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylim(0, 1.01)
    axes.set_ylabel("share of the sum of |a|")
    _color_bar(figure, axes, study)
    title_axes(axes, f"|a| by rank, {study.label}", "dotted: all neurons alike")
    return figure


def budget_figure(study: Study, budget: BudgetResult) -> Figure:
    """Draws the share that each layer loses within the loss budget."""
    figure = new_figure()
    axes = figure.subplots()
    best = budget.best.allotment
    axes.bar(budget.layers, best.shares, color=color_of(0))
    axes.axhline(best.pruned, color=color_of(1), linewidth=1.8, label="all layers together")
    _finish(axes, "layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylim(0, 1)
    axes.set_ylabel("neurons pruned")
    axes.legend(frameon=False, fontsize=12)
    title_axes(
        axes,
        f"shares of {study.label} within {budget.settings.rise:g} nats",
        f"rise of the loss: predicted {best.predicted:.4f}, measured "
        f"{plus_minus(f'{budget.best_change.value:.4f}', budget.best_change.stderr)}; one share "
        "for all "
        f"layers {budget.uniform_change.value:.4f}",
    )
    return figure


# What a curve is of: the rule and the score.
_Line = tuple[str, str]


def _lines(study: Study) -> list[_Line]:
    return list(dict.fromkeys((point.rule, point.score) for point in study.points))


def _name(line: _Line) -> str:
    rule, score = line
    return score if rule == RANK else f"{score}, {rule}"


def _share(point: Point) -> float:
    """Returns where a point stands: thresholds prune what they prune, whatever was wanted."""
    return point.share if point.rule == RANK else point.pruned


def _curve(study: Study, line: _Line) -> list[Point]:
    """Returns the unpruned model and the points of one rule and score."""
    points = [p for p in study.points if (p.rule, p.score) == line and p.share]
    return [study.dense, *points]


def _loss_index(point: Point) -> int:
    return next(at for at, score in enumerate(point.scores) if score.metric == "loss")


def _loss(point: Point) -> float:
    return point.scores[_loss_index(point)].estimate.value


def _rise(point: Point) -> Difference:
    return point.changes[_loss_index(point)]


def _relative(point: Point, base: Point) -> float | None:
    """Returns the mean of the higher-is-better scores, each as a part of the unpruned model's.

    None when there is no such score, or the unpruned model has none above 0.
    """
    parts = [
        one.estimate.value / other.estimate.value
        for one, other in zip(point.scores, base.scores, strict=True)
        if one.higher_is_better and other.estimate.value > 0
    ]
    return float(np.mean(parts)) if parts else None


def _color(study: Study, layer: int) -> tuple[float, float, float, float]:
    red, green, blue, alpha = _LAYER_COLORS(layer / max(1, len(study.layers) - 1))
    return red, green, blue, alpha


def _color_bar(figure: Figure, axes: Axes, study: Study) -> None:
    scale = Normalize(0, max(1, len(study.layers) - 1))
    bar = figure.colorbar(ScalarMappable(scale, _LAYER_COLORS), ax=axes, label="layer")
    bar.locator = MaxNLocator(integer=True, nbins=8)
    bar.update_ticks()


def _finish(axes: Axes, x_label: str, percent_x: bool = False) -> None:
    axes.set_xlabel(x_label)
    style_axes(axes)
    # Ours counts whole steps.
    axes.xaxis.set_major_locator(AutoLocator())
    if percent_x:
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
