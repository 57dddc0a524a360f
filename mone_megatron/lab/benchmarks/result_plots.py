"""Draws a picture of a benchmark's result, beside its JSON file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from mone_megatron.lab.benchmarks.measure import Spread
from mone_megatron.lab.benchmarks.peers.task import PEER
from mone_megatron.report.plots import COLORS

if TYPE_CHECKING:
    from mone_megatron.lab.benchmarks.decode import DecodeResult
    from mone_megatron.lab.benchmarks.peers.compare import PeersResult
    from mone_megatron.lab.benchmarks.select import SelectCost
    from mone_megatron.lab.benchmarks.ties import TieStatistics

_SIZE = (8.0, 4.6)


def _new(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE, dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def bars(title: str, label: str, values: Mapping[str, Spread]) -> Figure:
    """Draws a bar a name, its range as a whisker, and a line at 1."""
    figure, axes = _new(title)
    names = list(values)
    for place, name in enumerate(names):
        value = values[name]
        below, above = value.median - value.smallest, value.largest - value.median
        axes.barh(
            place,
            value.median,
            xerr=[[below], [above]],
            color=COLORS[0],
            ecolor="#5c6673",
            capsize=3,
        )
        axes.annotate(
            f"{value.median:.3f}", (value.median, place), (4, 8), textcoords="offset points",
            fontsize=8,
        )  # fmt: skip
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.axvline(1.0, color="#5c6673", linewidth=0.8, linestyle="--")
    axes.set_xlabel(label)
    return figure


def decode_figure(result: DecodeResult) -> Figure:
    """Draws speed-up over the number of tokens, a colour a keep ratio, its limit dashed."""
    sizes = result.shape
    figure, axes = _new(
        f"Decoding: fastest dense experts / mone_sparse, h={sizes['hidden']} f={sizes['neurons']}, "
        f"{sizes['chosen']} of {sizes['experts']} experts"
    )
    for index, keep_ratio in enumerate(sorted({cell.keep_ratio for cell in result.cells})):
        cells = [cell for cell in result.cells if cell.keep_ratio == keep_ratio]
        tokens = [cell.tokens for cell in cells]
        color = COLORS[index % len(COLORS)]
        _ranges(
            axes, tokens, [cell.speed_up for cell in cells], color, f"keep ratio {keep_ratio:g}"
        )
        axes.plot(tokens, [cell.limit for cell in cells], color=color, linestyle="--")
    axes.plot([], [], color="#5c6673", linestyle="--", label="limit by bytes read")
    axes.axhline(1.0, color="#5c6673", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set(xlabel="tokens a step", ylabel="times faster")
    axes.legend(frameon=False)
    return figure


def peers_figure(result: PeersResult) -> Figure:
    """Draws step times over transformers', a bar a size, a colour a contender."""
    figure, axes = _new("Training steps over transformers' (processor time)")
    names = [one.above for one in result.cells[0].ratios if one.below == PEER]
    height = 0.8 / len(names)
    for index, name in enumerate(names):
        spreads = [cell.ratio(name, PEER).processor for cell in result.cells]
        axes.barh(
            [place + index * height for place in range(len(spreads))],
            [spread.median for spread in spreads],
            height=height,
            xerr=[
                [spread.median - spread.smallest for spread in spreads],
                [spread.largest - spread.median for spread in spreads],
            ],
            color=COLORS[index % len(COLORS)],
            ecolor="#5c6673",
            label=name,
        )
    places = [place + height * (len(names) - 1) / 2 for place in range(len(result.cells))]
    axes.set_yticks(places, [cell.size or "as given" for cell in result.cells])
    axes.invert_yaxis()
    axes.axvline(1.0, color="#5c6673", linewidth=0.8, linestyle="--")
    axes.set_xlabel("step time / transformers'")
    # Above the bars, beside the title: at the right it would lie on the line at 1.
    axes.legend(frameon=False, ncols=len(names), loc="lower right", bbox_to_anchor=(1.0, 1.0))
    return figure


def select_figure(cells: Sequence[SelectCost]) -> Figure:
    """Draws times of torch.topk + scatter over ours, by width, a colour a number of rows."""
    figure, axes = _new("The exact top-k mask: torch.topk + scatter / ours")
    for index, rows in enumerate(sorted({cell.rows for cell in cells})):
        chosen = [cell for cell in cells if cell.rows == rows]
        _ranges(
            axes,
            [cell.neurons for cell in chosen],
            [cell.topk_scatter_over_ours for cell in chosen],
            COLORS[index % len(COLORS)],
            f"{rows} rows",
        )
    axes.axhline(1.0, color="#5c6673", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set(xlabel="neurons", ylabel="times faster")
    axes.legend(frameon=False)
    return figure


def ties_figure(models: Mapping[str, TieStatistics]) -> Figure:
    """Draws load over a neuron's index, and what the tie rule adds to it, a colour a model."""
    figure, axes = _new("Load of the neurons by their index; dashed: what the tie rule adds")
    for index, (name, ties) in enumerate(models.items()):
        color = COLORS[index % len(COLORS)]
        parts = len(ties.load_over_parts)
        places = [100 * (part + 0.5) / parts for part in range(parts)]
        loads = [100 * (load - 1) for load in ties.load_over_parts]
        biases = [100 * bias for bias in ties.bias_over_parts]
        axes.plot(places, loads, color=color, linewidth=1.2, label=name)
        axes.plot(places, biases, color=color, linewidth=1.8, linestyle="--")
    axes.axhline(0.0, color="#5c6673", linewidth=0.8)
    axes.set(xlabel="index of the neuron (percent of f)", ylabel="percent of the mean load")
    axes.legend(frameon=False, fontsize=7)
    return figure


def _ranges(
    axes: Axes, places: Sequence[int], values: Sequence[Spread], color: str, label: str
) -> None:
    medians = [value.median for value in values]
    below = [value.median - value.smallest for value in values]
    above = [value.largest - value.median for value in values]
    axes.errorbar(
        places, medians, yerr=[below, above], color=color, marker="o", capsize=3, linewidth=1.6,
        elinewidth=0.7, label=label,
    )  # fmt: skip


def write(figure: Figure, path: Path) -> None:
    """Writes the figure as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
