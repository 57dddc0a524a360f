"""Formats numbers as people read them, the same in tables, plots and pages."""

from __future__ import annotations

import math
from collections.abc import Sequence

ABSENT = "-"


def format_count(value: float | None) -> str:
    """Returns 1234567 as ``1.23M``: three significant digits, K, M, B or T; ``-`` if unknown."""
    if value is None or not math.isfinite(value):
        return ABSENT
    for scale, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        # 999,950 and up would print as 1000K.
        if abs(value) >= scale * 0.9995:
            scaled = value / scale
            digits = 2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0
            return f"{scaled:.{digits}f}{suffix}"
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.3g}"


def format_loss(value: float | None) -> str:
    """Returns a loss with four decimals; ``-`` when there is none; ``nan`` or ``inf`` if it
    diverged.
    """
    if value is None:
        return ABSENT
    return f"{value:.4f}"


def format_signed(value: float | None) -> str:
    """Returns four decimals with a sign; ``-`` for None; ``nan`` when either loss diverged."""
    if value is None:
        return ABSENT
    return f"{value:+.4f}" if not math.isnan(value) else "nan"


def format_ratio(value: float | None) -> str:
    """Returns 1.083 as ``1.083x``; ``-`` when unknown."""
    if value is None or not math.isfinite(value):
        return ABSENT
    return f"{value:.3f}x"


def format_number(value: float | None) -> str:
    """Returns four significant digits, for figures without a unit; ``-`` when there is none."""
    if value is None:
        return ABSENT
    return f"{value:.4g}"


def plus_minus(value: str, error: float, spec: str = ".4f") -> str:
    """Returns ``value ± error``; ``value (error unknown)`` when one sample or none tells it.

    Args:
        value: formatted.
        error: a standard error or the half-width of an interval; NaN when unknown.
        spec: how to format it.
    """
    return f"{value} (error unknown)" if math.isnan(error) else f"{value} ± {error:{spec}}"


def format_duration(seconds: float | None) -> str:
    """Returns 3725 seconds as ``1 h 2 min``; below two minutes in seconds; ``-`` when unknown."""
    if seconds is None or not math.isfinite(seconds):
        return ABSENT
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h"


def text_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: Sequence[int] = (0, -1),
    ruled: bool = True,
) -> str:
    """Returns a table of text for a terminal, its columns two spaces apart.

    Args:
        header: names the columns.
        rows: one text a column.
        left: the columns that are aligned to the left, as names are; the others, numbers, to the
            right. -1 is the last one.
        ruled: whether a line is drawn below the header.
    """
    table = [list(header), *map(list, rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    aligned = {column % len(header) for column in left}
    lines = []
    for row in table:
        cells = [
            cell.ljust(width) if column in aligned else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    if ruled:
        lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
