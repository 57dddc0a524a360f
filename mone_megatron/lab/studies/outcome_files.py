"""Writes a study's outcome as a table, a picture, and files."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure

from mone_megatron.lab.studies.outcome import Outcome, Variant
from mone_megatron.lab.studies.words import conclusions
from mone_megatron.report.formatting import ABSENT, format_count, plus_minus
from mone_megatron.report.identified import NOT_IDENTIFIED, reasons
from mone_megatron.report.plots import (
    color_of,
    marker_of,
    new_figure,
    png_bytes,
    style_axes,
    title_axes,
)
from mone_megatron.report.stats import Interval
from mone_megatron.whole_files import write_json, write_whole

# Costs that differ by no more are drawn as one: equal budgets are, off by up to 1% either way.
_ALIKE_WITHIN = 0.02
# What a variant costs: a title, the label of the axis, the number.
COSTS: tuple[tuple[str, str, Callable[[Variant], float]], ...] = (
    ("Size", "parameters a token activates, gate counted", lambda one: one.budget.activated),
    (
        "Decoding",
        "bytes read to decode a token, bf16, batch 1",
        lambda one: one.budget.decode_bytes,
    ),
    ("Training", "operations that a training step computes", lambda one: one.realised_flops),
)


def _pm(interval: Interval, spec: str) -> str:
    return plus_minus(f"{interval.mean:{spec}}", interval.half_width)


def table_rows(outcome: Outcome) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Returns the header and a row a variant, lowest difference first: mean and difference to the
    reference with 95% intervals, what decoding a token and a training step cost, seeds.
    """
    header = (
        "",
        "parameters",
        "activated",
        "val_loss",
        f"less {outcome.reference}'s",
        "",
        "decode bytes",
        "step FLOPs",
        "step time",
        "seeds",
    )
    return header, [
        (
            variant.name,
            format_count(variant.parameters),
            format_count(round(variant.budget.activated)),
            _pm(variant.mean, ".4f"),
            _pm(variant.compared, "+.4f") if variant.compared else "",
            variant.verdict,
            format_count(round(variant.budget.decode_bytes)),
            f"{outcome.flops_ratio(variant):.2f}x",
            _ratio(outcome.step_ratio(variant)),
            str(len(variant.seeds)),
        )
        for variant in outcome.ranked
    ]


def _ratio(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.2f}x"


def markdown(outcome: Outcome) -> str:
    """Returns the question, the table and what it tells in words, as Markdown."""
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
            *(line for sentence in conclusions(outcome) for line in ("", sentence)),
            *_unknown(outcome),
        ]
    )


def _unknown(outcome: Outcome) -> list[str]:
    """Returns lines that name the variants whose difference is not known, with the reasons."""
    told = [f"{one.name}: {reasons(one.doubts)}" for one in outcome.variants if one.doubts]
    return ["", f"{NOT_IDENTIFIED}: {'; '.join(told)}"] if told else []


def figure(outcome: Outcome) -> Figure:
    """Draws each seed's difference to the reference as a dot, the mean with its interval."""
    drawn = [(variant, one) for variant in outcome.ranked if (one := variant.compared)]
    chart = new_figure()
    chart.set_size_inches(12, 2.5 + 0.8 * len(drawn))
    axes = chart.subplots()
    for place, (variant, difference) in enumerate(drawn):
        color = color_of(outcome.variants.index(variant))
        axes.plot(
            list(variant.differences.values()),
            [place] * len(variant.differences),
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
        f"{outcome.size}: each seed (dots), mean and 95% interval"
        + (f"; {NOT_IDENTIFIED}" if any(variant.doubts for variant, _ in drawn) else ""),
    )
    return chart


def paired_loss(outcome: Outcome, variant: Variant) -> tuple[Interval, list[float]]:
    """Returns a variant's loss without what a seed does to all variants: the reference's mean plus
    the difference with its interval, and the same of each seed.

    The reference, and a variant without a seed in common with it, has its own mean and no interval.
    """
    base = outcome.reference_variant.mean.mean
    if variant.difference is None:
        return Interval(variant.mean.mean, math.nan, variant.mean.count), []
    moved = replace(variant.difference, mean=base + variant.difference.mean)
    return moved, [base + difference for difference in variant.differences.values()]


def frontier(outcome: Outcome) -> Figure:
    """Draws the loss of every variant over what a token or a step costs.

    Each seed is a dot, the mean has its interval, and a line goes through the variants that no
    other beats in both. Where all cost the same they stand side by side.
    """
    chart = new_figure()
    chart.set_size_inches(15, 6.5)
    ranked = outcome.ranked
    places = chart.subplots(1, len(COSTS), sharey=True)
    for axes, (title, label, cost_of) in zip(places, COSTS, strict=True):
        costs = [cost_of(variant) for variant in ranked]
        alike = alike_in(costs)
        points = []
        for rank, (variant, cost) in enumerate(zip(ranked, costs, strict=True)):
            place = outcome.variants.index(variant)
            color, x = color_of(place), rank if alike else cost
            loss, seeds = paired_loss(outcome, variant)
            points.append((cost, loss.mean))
            axes.plot([x] * len(seeds), seeds, "o", color=color, alpha=0.35)
            axes.errorbar(
                x,
                loss.mean,
                yerr=loss.half_width,
                fmt=marker_of(place),
                color=color,
                capsize=5,
                label=variant.name,
            )
        style_axes(axes)
        axes.margins(x=0.08)
        if alike:
            typical = format_count(cost_of(outcome.reference_variant))
            label = f"{label}: {typical}, all within {_ALIKE_WITHIN:.0%}"
            axes.set_xticks([])
        else:
            axes.step(
                *zip(*unbeaten(points), strict=True),
                where="post",
                color="#5c6673",
                linestyle="--",
                zorder=1,
            )
            axes.xaxis.set_major_formatter(lambda value, _: format_count(round(value)))
            axes.tick_params(axis="x", rotation=30)
        axes.set_xlabel(textwrap.fill(label, 36))
        axes.set_title(title, fontsize=13, loc="left")
    places[0].set_ylabel("val_loss, nats a token, seeds paired; lower is better")
    # Beside the plots when it would cover the points.
    beside = len(outcome.variants) > 6
    places[-1].legend(
        frameon=False,
        fontsize=11,
        loc="upper left" if beside else "best",
        bbox_to_anchor=(1.0, 1.0) if beside else None,
    )
    return chart


def alike_in(costs: Sequence[float]) -> bool:
    """Returns whether costs differ too little for places along an axis to say anything."""
    return max(costs) - min(costs) <= _ALIKE_WITHIN * max(costs)


def unbeaten(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
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
