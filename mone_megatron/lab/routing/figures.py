"""Draws static pictures of a routing analysis."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from mone_megatron.lab.routing.counting import conditional, divide
from mone_megatron.lab.routing.statistics import LayerStatistics
from mone_megatron.lab.routing.statistics_files import Analysis
from mone_megatron.lab.routing.summary import LayerSummary, union_shares
from mone_megatron.mone.chunk_unions import CHUNK_LENGTHS
from mone_megatron.report.plots import color_of, png_bytes, style_axes
from mone_megatron.report.stats import FloatArray
from mone_megatron.whole_files import write_whole

_INK, _SOFT = "#1b1f24", "#5c6673"
# Beyond these a picture would be a blur: layers are taken at even distances.
_MAX_PANELS = 12


def write_figures(analysis: Analysis, folder: Path) -> list[Path]:
    """Writes every picture that there is data for and returns the paths."""
    figures = {
        "load.png": load_figure(analysis),
        "coactivation.png": coactivation_figure(analysis),
        "saturation.png": saturation_figure(analysis),
        "specialisation.png": specialisation_figure(analysis),
        "neurons.png": neuron_figure(analysis),
        "unions.png": union_figure(analysis),
    }
    return [
        write_whole(folder / name, png_bytes(figure))
        for name, figure in figures.items()
        if figure is not None
    ]


def load_figure(analysis: Analysis) -> Figure:
    """Draws each expert's load over the even load, by layer of the last checkpoint."""
    final = analysis.checkpoints[-1]
    loads = [
        divide(layer.experts.tokens_E, layer.experts.tokens_E.mean()) for layer in final.layers
    ]
    grid = _padded(loads)
    figure = _figure(9, 1.6 + 0.3 * len(loads))
    axes = figure.subplots()
    image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    _layer_ticks(axes, final.layers)
    axes.set_xlabel("expert")
    _title(axes, f"Load over the even load, {final.name}")
    figure.colorbar(image, ax=axes, label="times the even load")
    return figure


def coactivation_figure(analysis: Analysis) -> Figure:
    """Draws the co-activation count(i, j) / count(i) of the last checkpoint, a panel a layer."""
    layers = _some(analysis.checkpoints[-1].layers)
    columns = min(4, len(layers))
    rows = -(-len(layers) // columns)
    figure = _figure(3.4 * columns, 3.4 * rows)
    panels = figure.subplots(rows, columns, squeeze=False)
    matrices = []
    for layer in layers:
        matrix = conditional(layer.experts.together_EE)
        np.fill_diagonal(matrix, np.nan)
        matrices.append(matrix)
    largest = max((np.nanmax(m) for m in matrices if np.isfinite(m).any()), default=1.0)
    for axes in panels.flat:
        axes.set_visible(False)
    for axes, layer, matrix in zip(panels.flat, layers, matrices, strict=False):
        axes.set_visible(True)
        image = axes.imshow(matrix, cmap="viridis", vmin=0, vmax=largest, interpolation="nearest")
        axes.set_title(f"layer {layer.shape.layer}", fontsize=11, color=_INK)
        axes.set_xlabel("expert j", color=_SOFT)
        axes.set_ylabel("expert i", color=_SOFT)
    figure.colorbar(image, ax=panels, label="tokens of i that also go to j")
    figure.suptitle(f"Expert co-activation, {analysis.checkpoints[-1].name}", color=_INK)
    return figure


def saturation_figure(analysis: Analysis) -> Figure | None:
    """Draws the experts and kept neurons shared with the last checkpoint, over the checkpoints.

    Returns None where there is one checkpoint only.
    """
    earlier = analysis.checkpoints[:-1]
    if not earlier:
        return None
    places, label = analysis.places()
    summaries = analysis.summaries[:-1]
    figure = _figure(11, 5)
    left, right = figure.subplots(1, 2)
    top_k = min(layer.shape.top_k for one in earlier for layer in one.layers)
    for index, k in enumerate(_top_ks(top_k)):
        rows = [
            [s[k - 1] for layer in one.layers if (s := layer.experts.saturation_K) is not None]
            for one in earlier
        ]
        _line(left, places[:-1], rows, f"top {k}", index)
    independent = "independent, same loads"
    rows = [[layer.expert_saturation_by_load for layer in one] for one in summaries]
    _line(left, places[:-1], rows, f"top {top_k}, {independent}", 0, "--")
    left.set_ylabel("mean |S & S final| / k")
    _title(left, "Router saturation, mean over layers")
    rows = [[layer.neuron_saturation for layer in one] for one in summaries]
    _line(right, places[:-1], rows, "kept neurons", 0)
    rows = [[layer.neuron_saturation_by_load for layer in one] for one in summaries]
    _line(right, places[:-1], rows, independent, 0, "--")
    right.set_ylabel("share of the kept set")
    _title(right, "Neuron saturation, in experts in common")
    for axes in (left, right):
        axes.set_xlabel(label)
        style_axes(axes)
        if len(earlier) == 1:
            # Around one step a locator finds fractions of steps.
            axes.set_xticks(places[:-1])
        axes.set_ylim(0, 1.02)
        axes.legend(frameon=False)
    return figure


def specialisation_figure(analysis: Analysis) -> Figure | None:
    """Draws how far tokens and domains are routed apart, by layer of the last checkpoint.

    Returns None where nothing of it was measured.
    """
    final, summaries = analysis.checkpoints[-1], analysis.summaries[-1]
    curves = [
        ("token_specialisation", "largest share of a token, mean", "-"),
        ("token_specialisation_even", "the same without specialisation", "--"),
        ("domain_specialisation", "distance of domains", "-"),
    ]
    if not np.isfinite([[getattr(one, key) for key, _, _ in curves] for one in summaries]).any():
        return None
    figure = _figure(9, 4.6)
    axes = figure.subplots()
    _by_layer(axes, final.layers, summaries, curves)
    axes.set_ylabel("share of occurrences, or of a load")
    _title(axes, f"Expert specialisation, {final.name}")
    return figure


def neuron_figure(analysis: Analysis) -> Figure | None:
    """Draws sorted loads of neurons and what adjacent tokens share, of the last checkpoint.

    Returns None where no neurons were recorded.
    """
    final, summaries = analysis.checkpoints[-1], analysis.summaries[-1]
    layers = [layer for layer in _some(final.layers) if layer.neurons is not None]
    if not layers:
        return None
    figure = _figure(12, 5)
    left, right = figure.subplots(1, 2)
    for index, layer in enumerate(layers):
        assert layer.neurons is not None
        used = layer.experts.tokens_E > 0
        loads = divide(layer.neurons.kept_EF[used], layer.experts.tokens_E[used, None])
        ordered = -np.sort(-loads.reshape(-1))
        left.plot(
            np.linspace(0, 1, len(ordered)),
            ordered,
            color=color_of(index),
            label=f"layer {layer.shape.layer}",
        )
    left.set_xlabel("share of the layer's neurons, the most kept first")
    left.set_ylabel("share of the expert's tokens that keep it")
    style_axes(left)
    left.xaxis.set_major_locator(MaxNLocator(nbins=5))
    left.legend(frameon=False, fontsize=9)
    _title(left, f"Neuron load, {final.name}")
    curves = [
        ("neuron_adjacent", "kept neurons shared by adjacent tokens", "-"),
        ("neuron_adjacent_by_load", "by independent ones of these loads", "--"),
        ("dead_neurons", "dead neurons", "-"),
    ]
    _by_layer(right, final.layers, summaries, curves)
    right.set_ylabel("share of kept, or of all, neurons")
    _title(right, "Adjacent tokens and dead neurons")
    return figure


def union_figure(analysis: Analysis) -> Figure | None:
    """Draws what chunks of adjacent tokens keep between them, of the last checkpoint.

    Returns None where no neurons were recorded.
    """
    final = analysis.checkpoints[-1]
    layers = [layer for layer in _some(final.layers) if layer.neurons is not None]
    if not layers:
        return None
    figure = _figure(9, 5)
    axes = figure.subplots()
    for index, layer in enumerate(layers):
        shares_L, by_load_L = union_shares(layer)
        name = f"layer {layer.shape.layer}"
        axes.plot(CHUNK_LENGTHS, shares_L, "o-", color=color_of(index), label=name)
        axes.plot(CHUNK_LENGTHS, by_load_L, "--", color=color_of(index), alpha=0.6)
    axes.set_xscale("log", base=2)
    axes.set_xticks(CHUNK_LENGTHS, [str(length) for length in CHUNK_LENGTHS])
    axes.set_xlabel("adjacent tokens L (dashed: independent tokens of the same loads)")
    axes.set_ylabel("share of the layer's neurons that any of them keeps")
    style_axes(axes)
    axes.set_ylim(0, None)
    axes.legend(frameon=False, fontsize=9)
    _title(axes, f"What a step of L tokens reads, {final.name}")
    return figure


def _by_layer(
    axes: Axes,
    layers: Sequence[LayerStatistics],
    summaries: Sequence[LayerSummary],
    curves: Sequence[tuple[str, str, str]],
) -> None:
    """Draws those of the curves (field, label, line style) that have values."""
    places = [layer.shape.layer for layer in layers]
    for index, (key, label, style) in enumerate(curves):
        rows = [[getattr(summary, key)] for summary in summaries]
        if np.isfinite(rows).any():
            _line(axes, places, rows, label, index, style)
    axes.set_xlabel("layer")
    style_axes(axes)
    axes.set_ylim(0, None)
    axes.legend(frameon=False, fontsize=10)


def _line(
    axes: Axes,
    places: Sequence[int],
    rows: Sequence[Sequence[float]],
    label: str,
    color: int,
    style: str = "-",
) -> None:
    """Draws the mean of each row over its place."""
    values = [_mean(row) for row in rows]
    marker = "o" if len(values) < 40 else ""
    # One value has a marker and no line: hollow where the line is dashed.
    filled = "full" if style == "-" else "none"
    axes.plot(places, values, style, marker=marker, fillstyle=filled, color=color_of(color),
              label=label)  # fmt: skip


def _top_ks(top_k: int) -> list[int]:
    """Returns the numbers k to draw: all, and the halves down to one.

    Six experts give FLAME-MoE's 6, 4, 2, 1.
    """
    if top_k == 6:
        return [6, 4, 2, 1]
    return sorted({max(1, top_k >> shift) for shift in range(top_k.bit_length())}, reverse=True)


def _some(layers: Sequence[LayerStatistics]) -> Sequence[LayerStatistics]:
    if len(layers) <= _MAX_PANELS:
        return layers
    places = np.linspace(0, len(layers) - 1, _MAX_PANELS).astype(int)
    return [layers[place] for place in places.tolist()]


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else np.nan


def _padded(rows: Sequence[FloatArray]) -> FloatArray:
    grid = np.full((len(rows), max(map(len, rows))), np.nan)
    for index, row in enumerate(rows):
        grid[index, : len(row)] = row
    return grid


def _layer_ticks(axes: Axes, layers: Sequence[LayerStatistics]) -> None:
    every = -(-len(layers) // 24)
    places = list(range(0, len(layers), every))
    axes.set_yticks(places, [str(layers[place].shape.layer) for place in places])
    axes.set_ylabel("layer")


def _figure(width: float, height: float) -> Figure:
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)
    return Figure(figsize=(width, height), dpi=100, layout=layout, facecolor="white")


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text.replace("$", r"\$"), loc="left", fontsize=13, color=_INK)
