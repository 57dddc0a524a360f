"""Writes a study's outcome as a table, a picture, and files."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from mone_megatron.lab.studies.outcome import Outcome
from mone_megatron.report.formatting import format_count, plus_minus
from mone_megatron.report.identified import NOT_IDENTIFIED, reasons
from mone_megatron.report.plots import (
    color_of,
    new_figure,
    png_bytes,
    style_axes,
    title_axes,
)
from mone_megatron.report.stats import Interval
from mone_megatron.whole_files import write_json, write_whole

# What a token costs: the field of its budget, the label of the axis, a title.
_COSTS = (
    ("activated", "parameters a token activates, gate counted", "Size"),
    ("decode_bytes", "bytes read to decode a token, bf16, batch 1", "Decoding"),
    ("step_flops", "operations that a training step needs", "Training"),
)


def _pm(interval: Interval, spec: str) -> str:
    return plus_minus(f"{interval.mean:{spec}}", interval.half_width)


def table_rows(outcome: Outcome) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Returns the header and a row a variant: mean, difference to the reference, 95% intervals."""
    header = ("", "parameters", "activated", "val_loss", f"less {outcome.reference}'s", "")
    return header, [
        (
            variant.name,
            format_count(variant.parameters),
            format_count(round(variant.budget.activated)),
            _pm(variant.mean, ".4f"),
            _pm(variant.compared, "+.4f") if variant.compared else "",
            variant.verdict,
        )
        for variant in outcome.variants
    ]


def markdown(outcome: Outcome) -> str:
    """Returns the question and the table, as Markdown."""
    header, rows = table_rows(outcome)
    # A bar would end the cell.
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    titles, *lines = (" ".join(["|", " | ".join(row), "|"]) for row in cells)
    return "\n".join(
        [
            f"**{outcome.question}** (`{outcome.name}`, {outcome.size})",
            "",
            titles,
            "|---" * len(header) + "|",
            *lines,
            *_unknown(outcome),
        ]
    )


def _unknown(outcome: Outcome) -> list[str]:
    """Returns lines that name the variants whose difference is not known, with the reasons."""
    told = [f"{one.name}: {reasons(one.doubts)}" for one in outcome.variants if one.doubts]
    return ["", f"{NOT_IDENTIFIED}: {'; '.join(told)}"] if told else []


def figure(outcome: Outcome) -> Figure:
    """Draws each seed's difference to the reference as a dot, the mean with its interval."""
    drawn = [(variant, one) for variant in outcome.variants if (one := variant.compared)]
    reference = next(v for v in outcome.variants if v.name == outcome.reference)
    chart = new_figure()
    chart.set_size_inches(12, 2.5 + 0.8 * len(drawn))
    axes = chart.subplots()
    for place, (variant, difference) in enumerate(drawn):
        color = color_of(outcome.variants.index(variant))
        pairs = zip(variant.losses, reference.losses, strict=True)
        axes.plot(
            [own - other for own, other in pairs],
            [place] * len(variant.losses),
            "o",
            color=color,
            alpha=0.35,
        )
        axes.errorbar(
            difference.mean,
            place,
            xerr=difference.half_width,
            fmt="D",
            color=color,
            capsize=5,
        )
    axes.axvline(0.0, color="#5c6673", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(drawn)), [variant.name for variant, _ in drawn])
    axes.set_ylim(len(drawn) - 0.5, -0.5)
    axes.set_xlabel(f"val_loss less that of {outcome.reference}, nats a token; left is better")
    style_axes(axes)
    title_axes(
        axes,
        textwrap.fill(outcome.question, 62),
        f"{len(reference.seeds)} seeds (dots), mean and 95% interval; {outcome.tokens:,} tokens"
        + (f"; {NOT_IDENTIFIED}" if any(variant.doubts for variant, _ in drawn) else ""),
    )
    return chart


def frontier(outcome: Outcome) -> Figure:
    """Draws the loss of every variant over what a token costs.

    Each seed is a dot, the mean has its interval, and a line goes through the variants that no
    other beats in both.
    """
    chart = new_figure()
    chart.set_size_inches(15, 6.5)
    places = chart.subplots(1, len(_COSTS), sharey=True)
    for axes, (name, label, short) in zip(places, _COSTS, strict=True):
        costs = [getattr(variant.budget, name) for variant in outcome.variants]
        for place, (variant, cost) in enumerate(zip(outcome.variants, costs, strict=True)):
            color = color_of(place)
            axes.plot([cost] * len(variant.losses), variant.losses, "o", color=color, alpha=0.35)
            axes.errorbar(
                cost,
                variant.mean.mean,
                yerr=variant.mean.half_width,
                fmt="D",
                color=color,
                capsize=5,
                label=variant.name,
            )
        best = _unbeaten([(c, v.mean.mean) for c, v in zip(costs, outcome.variants, strict=True)])
        axes.step(*zip(*best, strict=True), where="post", color="#5c6673", linestyle="--", zorder=1)
        axes.set_xlabel(label)
        axes.xaxis.set_major_formatter(lambda value, _: format_count(round(value)))
        axes.tick_params(axis="x", rotation=30)
        style_axes(axes)
        axes.set_title(short, fontsize=13, loc="left")
    places[0].set_ylabel("val_loss, nats a token; lower is better")
    places[-1].legend(frameon=False, fontsize=11)
    return chart


def _unbeaten(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns the points (cost, loss) with no other that is cheaper and better, cheapest first."""
    best: list[tuple[float, float]] = []
    for cost, loss in sorted(point for point in points if math.isfinite(point[1])):
        if not best or loss < best[-1][1]:
            best.append((cost, loss))
    return best or [(math.nan, math.nan)]


def write(outcome: Outcome, folder: Path) -> list[Path]:
    """Writes the outcome as JSON, table and pictures, and returns the paths."""
    return [
        write_json(folder / "study.json", outcome.to_json()),
        write_whole(folder / "study.md", markdown(outcome) + "\n"),
        write_whole(folder / "study.png", png_bytes(figure(outcome))),
        write_whole(folder / "frontier.png", png_bytes(frontier(outcome))),
    ]
