"""Writes a study's outcome as a table, a picture, and files."""

from __future__ import annotations

import textwrap
from pathlib import Path

from matplotlib.figure import Figure

from mone_megatron.lab.studies.outcome import Outcome
from mone_megatron.report.formatting import format_count, plus_minus
from mone_megatron.report.identified import NOT_IDENTIFIED, reasons
from mone_megatron.report.plots import COLORS, new_figure, png_bytes, style_axes, title_axes
from mone_megatron.report.stats import Interval
from mone_megatron.whole_files import write_json, write_whole


def _pm(interval: Interval, spec: str) -> str:
    return plus_minus(f"{interval.mean:{spec}}", interval.half_width)


def table_rows(outcome: Outcome) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Returns the header and a row a variant: mean, difference to the reference, 95% intervals."""
    header = ("", "parameters", "activated", "val_loss", f"less {outcome.reference}'s", "")
    return header, [
        (
            variant.name,
            format_count(variant.parameters),
            format_count(variant.activated),
            _pm(variant.mean, ".4f"),
            _pm(variant.difference, "+.4f") if variant.difference else "",
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
    drawn = [variant for variant in outcome.variants if variant.difference is not None]
    reference = next(v for v in outcome.variants if v.name == outcome.reference)
    chart = new_figure()
    chart.set_size_inches(12, 2.5 + 0.8 * len(drawn))
    axes = chart.subplots()
    for place, variant in enumerate(drawn):
        assert variant.difference is not None
        color = COLORS[place % len(COLORS)]
        pairs = zip(variant.losses, reference.losses, strict=True)
        axes.plot(
            [own - other for own, other in pairs],
            [place] * len(variant.losses),
            "o",
            color=color,
            alpha=0.35,
        )
        axes.errorbar(
            variant.difference.mean,
            place,
            xerr=variant.difference.half_width,
            fmt="D",
            color=color,
            capsize=5,
        )
    axes.axvline(0.0, color="#5c6673", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(drawn)), [variant.name for variant in drawn])
    axes.set_ylim(len(drawn) - 0.5, -0.5)
    axes.set_xlabel(f"val_loss less that of {outcome.reference}, nats a token; left is better")
    style_axes(axes)
    title_axes(
        axes,
        textwrap.fill(outcome.question, 62),
        f"{len(reference.seeds)} seeds (dots), mean and 95% interval; {outcome.tokens:,} tokens"
        + (f"; {NOT_IDENTIFIED}" if any(one.doubts for one in drawn) else ""),
    )
    return chart


def write(outcome: Outcome, folder: Path) -> list[Path]:
    """Writes ``study.json``, ``study.md`` and ``study.png``, and returns their paths."""
    return [
        write_json(folder / "study.json", outcome.to_json()),
        write_whole(folder / "study.md", markdown(outcome) + "\n"),
        write_whole(folder / "study.png", png_bytes(figure(outcome))),
    ]
