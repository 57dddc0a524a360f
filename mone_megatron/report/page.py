"""Builds self-contained HTML pages with interactive charts: one file that needs no network."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib import resources
from typing import Any, Literal

import numpy as np

from mone_megatron.counting import counted
from mone_megatron.report.formatting import format_number
from mone_megatron.report.runs import LayerGrid, Series
from mone_megatron.report.stats import FloatArray
from mone_megatron.whole_files import json_text

# Points a curve and columns a heatmap keep in the page, so that a long run stays a small file.
MAX_CURVE_POINTS = 1600
MAX_HEATMAP_COLUMNS = 160

CurveKind = Literal["line", "faint", "points"]


def escape(text: object) -> str:
    """Returns `text` as HTML text or attribute value."""
    return html.escape(str(text), quote=True)


def thin(series: Series, max_points: int = MAX_CURVE_POINTS) -> Series:
    """Returns the lowest and the highest point of each stretch, `max_points` in all at most, so
    spikes stay.

    A stretch that holds a non-finite value keeps that too, as the gap that it is.
    """
    if len(series) <= max_points:
        return series
    kept: set[int] = {0, len(series) - 1}
    edges = np.linspace(0, len(series), max(max_points // 3, 1) + 1).astype(int)
    for start, stop in itertools.pairwise(edges.tolist()):
        values = series.values[start:stop]
        finite = np.flatnonzero(np.isfinite(values))
        if len(finite):
            kept.add(start + int(finite[np.argmin(values[finite])]))
            kept.add(start + int(finite[np.argmax(values[finite])]))
        if len(finite) < len(values):
            kept.add(start + int(np.flatnonzero(~np.isfinite(values))[0]))
    indices = np.asarray(sorted(kept))
    return Series(series.steps[indices], series.values[indices])


def thin_grid(grid: LayerGrid, max_columns: int = MAX_HEATMAP_COLUMNS) -> LayerGrid:
    """Returns at most `max_columns` columns, each the mean of the finite values of neighbouring
    steps.
    """
    if len(grid.steps) <= max_columns:
        return grid
    edges = np.linspace(0, len(grid.steps), max_columns + 1).astype(int)
    columns = []
    for start, stop in itertools.pairwise(edges.tolist()):
        block = grid.values[:, start:stop]
        counts = np.isfinite(block).sum(axis=1)
        sums = np.nansum(block, axis=1)
        columns.append(np.where(counts > 0, sums / np.maximum(counts, 1), np.nan))
    return LayerGrid(grid.layers, grid.steps[edges[1:] - 1], np.stack(columns, axis=1))


def _numbers(values: FloatArray, digits: int = 6) -> list[float | None]:
    """Returns numbers for JSON, which has no NaN: None stands for any that is not finite."""
    return [float(f"{value:.{digits}g}") if math.isfinite(value) else None for value in values]


def asset(package: str, name: str) -> str:
    """Returns a style or a script that lies beside the modules of a package, for a page.

    ``page.js`` draws every ``<div class="chart" data-id="...">`` and ``<div class="heatmap" ...>``
    from the JSON in ``<script id="data">``. Text reaches a page through ``textContent`` only.
    """
    return "\n" + resources.files(package).joinpath(name).read_text(encoding="utf-8")


@dataclass(frozen=True)
class Curve:
    """Describes one curve of a chart.

    Attributes:
        series: the curve.
        name: its name in legend and readout; "" leaves it out of the legend.
        color: index into the page's eight colours.
        kind: a strong line, a faint one behind, or points.
        dash: dashed, to tell curves apart beyond eight.
        low, high: ``[n]`` edges of a band around the curve, with the curve's steps.
    """

    series: Series
    name: str = ""
    color: int = 0
    kind: CurveKind = "line"
    dash: bool = False
    low: FloatArray | None = None
    high: FloatArray | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns what the page's script draws: attributes, and thinned points."""
        if self.low is None or self.high is None:
            series = thin(self.series)
            bands: dict[str, list[float | None]] = {}
        else:
            # Taken at even distances, since a band has to share the steps of its curve.
            stride = max(1, math.ceil(len(self.series) / MAX_CURVE_POINTS))
            series = Series(self.series.steps[::stride], self.series.values[::stride])
            bands = {
                "low": _numbers(self.low[::stride]),
                "high": _numbers(self.high[::stride]),
            }
        return {
            "name": self.name,
            "color": self.color % 8,
            "kind": self.kind,
            "dash": self.dash,
            "x": series.steps.tolist(),
            "y": _numbers(series.values),
            **bands,
        }


@dataclass(frozen=True)
class Cell:
    """Describes a cell of a table that is more than its text.

    Attributes:
        text: what is shown.
        link: the address that it leads to; "" for none.
        value: what it is sorted by; None takes the text.
        title: what a reader who points at it is told; "" for nothing.
    """

    text: str
    link: str = ""
    value: float | None = None
    title: str = ""


def _cell(cell: str | Cell, kind: str) -> str:
    """Returns a cell of a table as markup."""
    one = Cell(cell) if isinstance(cell, str) else cell
    value = "" if one.value is None else f' data-value="{one.value!r}"'
    title = f' title="{escape(one.title)}"' if one.title else ""
    text = escape(one.text)
    inner = f'<a href="{escape(one.link)}">{text}</a>' if one.link else text
    return f"<td{kind}{value}{title}>{inner}</td>"


@dataclass
class Page:
    """Collects the parts of a page in order; `render` gives the file's text."""

    title: str
    _body: list[str] = field(default_factory=list)
    _charts: dict[str, dict[str, Any]] = field(default_factory=dict)
    _heatmaps: dict[str, dict[str, Any]] = field(default_factory=dict)
    _extension: tuple[dict[str, Any], str, str] = ({}, "", "")

    def extend(self, data: dict[str, Any], *, style: str, script: str) -> None:
        """Adds views of the caller's own; the script has `data` as ``monePage.DATA.extension``."""
        self._extension = (data, style, script)

    def raw(self, markup: str) -> None:
        """Appends markup that is escaped already."""
        self._body.append(markup)

    def heading_one(self, text: str) -> None:
        """Appends the heading of the page."""
        self.raw(f"<h1>{escape(text)}</h1>")

    def heading(self, text: str, note: str = "") -> None:
        """Appends a section heading, with `note` as a line under it."""
        self.raw(f"<h2>{escape(text)}</h2>")
        if note:
            self.note(note)

    def note(self, text: str) -> None:
        """Appends a quiet paragraph."""
        self.raw(f'<p class="note">{escape(text)}</p>')

    def banner(
        self, kind: Literal["warn", "bad", "good"], text: str, items: Sequence[str] = ()
    ) -> None:
        """Appends a coloured box: what the reader has to know before the figures."""
        listing = "".join(f"<li>{escape(item)}</li>" for item in items)
        listing = f"<ul>{listing}</ul>" if listing else ""
        strong = f"<strong>{escape(text)}</strong>"
        self.raw(f'<div class="banner {kind}" role="status">{strong}{listing}</div>')

    def live(self, text: str, written: datetime, seconds: float) -> None:
        """Appends a line of a page that goes on: the page reads itself again where it stands.

        Args:
            text: how far it is.
            written: when the page was made, with its time zone.
            seconds: after which there may be a newer one.
        """
        at = f"{written:%Y-%m-%d %H:%M:%S %Z}"
        self.raw(
            f'<p class="live" id="live" role="status" data-seconds="{seconds:g}" '
            f'data-written="{written.isoformat()}"><strong>{escape(text)}</strong> Written '
            f'<time>{escape(at)}</time><span class="age"></span></p>'
        )

    def tiles(self, tiles: Sequence[tuple[str, str, str]]) -> None:
        """Appends headline figures, each a tuple (label, value, detail)."""
        cells = "".join(
            f'<div class="tile"><div class="label">{escape(label)}</div>'
            f'<div class="value">{escape(value)}</div>'
            f'<div class="detail">{escape(detail)}</div></div>'
            for label, value, detail in tiles
        )
        self.raw(f'<div class="tiles">{cells}</div>')

    def table(
        self,
        header: Sequence[str],
        rows: Sequence[Sequence[str | Cell]],
        wrap: bool = False,
        sortable: bool = False,
        identity: str = "",
    ) -> None:
        """Appends a table whose first column is text.

        Args:
            header: names the columns.
            rows: a text or a :class:`Cell` a column.
            wrap: makes all cells text that wraps.
            sortable: lets a click on a name of the header sort by that column, and one more the
                other way round: by the number that a cell begins with, else by its text.
            identity: of the element, for the page's own script; "" for none.
        """
        kind = ' class="text wrap"' if wrap else ""
        head = "".join(f"<th{kind}>{escape(cell)}</th>" for cell in header)
        body = "".join(
            "<tr>" + "".join(_cell(cell, kind) for cell in row) + "</tr>" for row in rows
        )
        attributes = (' class="sortable"' if sortable else "") + (
            f' id="{escape(identity)}"' if identity else ""
        )
        self.raw(
            f'<div class="scroll"><table{attributes}><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>"
        )

    def details(self, summary: str, text: str) -> None:
        """Appends preformatted text that opens on a click."""
        self.raw(
            f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"
        )

    def open_grid(self) -> None:
        """Opens a grid: cards that follow stand side by side where the window is wide enough."""
        self.raw('<div class="grid">')

    def close_grid(self) -> None:
        """Ends the cards side by side."""
        self.raw("</div>")

    def chart(
        self,
        title: str,
        curves: Sequence[Curve],
        *,
        note: str = "",
        zero: bool = False,
        height: int = 240,
        wide: bool = False,
        x_label: str = "step",
        marks: Sequence[tuple[int, str]] = (),
    ) -> None:
        """Appends a chart over steps with hover readout; dragging zooms, a double click undoes it.

        Args:
            title: over the chart.
            curves: drawn in order; names make the legend when there are several.
            note: a quiet line under the title.
            zero: the y axis includes 0.
            height: pixels.
            wide: stands alone rather than in a grid.
            x_label: what the x axis counts.
            marks: events: places on the x axis, and what to say of them.
        """
        identity = f"chart{len(self._charts)}"
        self._charts[identity] = {
            "id": identity,
            "title": title,
            "zero": zero,
            "height": height,
            "xLabel": x_label,
            "marks": [{"x": place, "text": text} for place, text in marks],
            "series": [curve.to_json() for curve in curves],
        }
        self._card("chart", identity, title, note, wide)

    def heatmap(
        self,
        title: str,
        grid: LayerGrid,
        *,
        note: str = "",
        columns: Literal["step", "expert"] = "step",
    ) -> None:
        """Appends a picture of layers by steps, or by experts; grey where there is no finite value.

        A metric that never changes is told in words: a picture of one colour says less.
        """
        thinned = thin_grid(grid) if columns == "step" else grid
        # The colours span what is drawn, which averaging may have narrowed.
        shown = thinned.values[np.isfinite(thinned.values)]
        low, high = _numbers(np.array([shown.min(), shown.max()])) if len(shown) else (None, None)
        if low == high:
            text = "no finite values" if low is None else f"{format_number(low)} everywhere"
            quiet = f'<p class="note">{escape(note)}</p>' if note else ""
            layers = counted(len(grid.layers), "layer")
            self.raw(
                f'<div class="card"><h3>{escape(title)}</h3>{quiet}'
                f"<p>{escape(text)} ({layers}, {len(grid.steps)} {columns}s)</p></div>"
            )
            return
        identity = f"heatmap{len(self._heatmaps)}"
        self._heatmaps[identity] = {
            "layers": list(thinned.layers),
            "steps": thinned.steps.tolist(),
            "columns": columns,
            "values": [_numbers(row, digits=4) for row in thinned.values],
            "low": low,
            "high": high,
        }
        self._card("heatmap", identity, title, note, wide=False)

    def _card(self, kind: str, identity: str, title: str, note: str, wide: bool) -> None:
        quiet = f'<p class="note">{escape(note)}</p>' if note else ""
        self.raw(
            f'<div class="card{" wide" if wide else ""}"><h3>{escape(title)}</h3>{quiet}'
            f'<div class="{kind}" data-id="{identity}"></div></div>'
        )

    def render(self) -> str:
        """Returns the page as one HTML document."""
        extension, style, script = self._extension
        data = json_text(
            {"charts": self._charts, "heatmaps": self._heatmaps, "extension": extension},
            indent=None,
            separators=(",", ":"),
        ).rstrip("\n")
        # Inside a script element only these could end it or open a comment.
        for character in "<>&":
            data = data.replace(character, f"\\u{ord(character):04x}")
        body = "\n".join(self._body)
        page_style, page_script = (asset(__package__, f"page.{kind}") for kind in ("css", "js"))
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self.title)}</title>\n<style>{page_style}{style}</style>\n</head>\n"
            f"<body><main>\n{body}\n</main>\n"
            f'<script type="application/json" id="data">{data}</script>\n'
            f"<script>{page_script}</script>\n"
            + (f"<script>{script}</script>\n" if script else "")
            + "</body>\n</html>\n"
        )
