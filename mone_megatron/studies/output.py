"""A study's outcome as a table, a picture, and files."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.figure import Figure

from mone_megatron.analysis.files import write_whole
from mone_megatron.analysis.formatting import format_count
from mone_megatron.analysis.plots import COLORS, new_figure, png_bytes, style_axes, title_axes
from mone_megatron.analysis.stats import Interval
from mone_megatron.studies.outcome import Outcome


def _pm(interval: Interval, spec: str) -> str:
    return f"{interval.mean:{spec}} ± {interval.half_width:.4f}"


def markdown(outcome: Outcome) -> str:
    """A table: mean and 95% interval over seeds, and the difference to the reference."""
    seeds = len(outcome.variants[0].seeds)
    lines = [
        f"**{outcome.question}** (`{outcome.name}`, {seeds} seeds, {outcome.tokens:,} tokens each)",
        "",
        f"| | parameters | activated | val_loss | less {outcome.reference}'s | |",
        "|---|---|---|---|---|---|",
    ]
    for variant in outcome.variants:
        difference = _pm(variant.difference, "+.4f") if variant.difference else ""
        lines.append(
            f"| {variant.name} | {format_count(variant.parameters)} | "
            f"{format_count(variant.activated)} | {_pm(variant.mean, '.4f')} | {difference} | "
            f"{variant.verdict} |"
        )
    return "\n".join(lines)


def figure(outcome: Outcome) -> Figure:
    """Each seed's difference to the reference as a dot, the mean with its interval."""
    drawn = [variant for variant in outcome.variants if variant.difference is not None]
    reference = next(v for v in outcome.variants if v.name == outcome.reference)
    chart = new_figure()
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
        outcome.question,
        f"{len(reference.seeds)} seeds (dots), mean and 95% interval; {outcome.tokens:,} tokens",
    )
    return chart


def write(outcome: Outcome, folder: Path) -> list[Path]:
    """``study.json``, ``study.md`` and ``study.png``."""
    content = json.dumps(outcome.to_json(), indent=2) + "\n"
    return [
        write_whole(folder / "study.json", content),
        write_whole(folder / "study.md", markdown(outcome) + "\n"),
        write_whole(folder / "study.png", png_bytes(figure(outcome))),
    ]
