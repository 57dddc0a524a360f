"""Writes ``routing.html``, which shows an analysis on one self-contained page to explore.

Shape suffixes: E experts, F neurons of an expert, D domains, V frequent tokens, M chosen neurons.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mone_megatron.lab.routing.counting import conditional, divide
from mone_megatron.lab.routing.statistics import LayerStatistics, TraceStatistics
from mone_megatron.lab.routing.statistics_files import Analysis
from mone_megatron.lab.routing.summary import LayerSummary, union_shares
from mone_megatron.mone.chunk_unions import CHUNK_LENGTHS
from mone_megatron.report.formatting import format_count
from mone_megatron.report.page import Curve, Page, asset
from mone_megatron.report.runs import Series
from mone_megatron.whole_files import write_whole

PAGE_FILE = "routing.html"
# Numbers in the page: some 20 MB. What does not fit is in the tables only, and the page says so.
MAX_NUMBERS = 4_000_000
# Tokens listed of each expert.
_TOKENS_SHOWN = 40


def write_explorer(analysis: Analysis, folder: Path) -> Path:
    """Writes ``routing.html`` into ``folder`` and returns its path."""
    return write_whole(folder / PAGE_FILE, explorer_page(analysis))


def explorer_page(analysis: Analysis, max_numbers: int = MAX_NUMBERS) -> str:
    """Returns the page as the text of an HTML file that needs no other file and no network."""
    final = analysis.checkpoints[-1]
    summaries = analysis.summaries
    page = Page(f"{final.name}: routing")
    page.raw("<header>")
    page.heading_one(f"Routing of {final.name}")
    page.note(_facts(analysis))
    page.raw("</header>")
    page.tiles(_tiles(analysis, summaries[-1]))
    if len(analysis.checkpoints) > 1:
        _over_checkpoints(page, analysis, summaries)
    _over_layers(page, final, summaries[-1])
    page.heading("Explore", "Choose here, or by a click on the first picture. Hover for numbers.")
    page.raw('<div id="explorer"></div>')
    # It finds its data in ``monePage.DATA.extension`` and fills ``<div id="explorer">``.
    style, script = (asset(__package__, f"explorer.{kind}") for kind in ("css", "js"))
    page.extend(_data(analysis, max_numbers), style=style, script=script)
    return page.render()


def _facts(analysis: Analysis) -> str:
    header, final = analysis.header, analysis.checkpoints[-1]
    parts = [
        f"{final.vocabulary.tokens:,} tokens",
        f"{len(header.domains)} domains" if len(header.domains) > 1 else header.domains[0],
        f"{len(header.layers)} layers with experts",
    ]
    if header.selection is None:
        parts.append("no neurons recorded")
    elif header.selection.by == "model":
        parts.append(
            f"neurons as the model keeps them: {header.selection.keep_ratio:g} by "
            f"{header.selection.score}"
        )
    else:
        parts.append(
            f"the model keeps all neurons; counted is the top {header.selection.keep_ratio:g} by "
            f"{header.selection.score}"
        )
    if len(analysis.checkpoints) > 1:
        parts.append(f"saturation is against {final.name}")
    return " · ".join(parts)


def _tiles(analysis: Analysis, summaries: Sequence[LayerSummary]) -> list[tuple[str, str, str]]:
    header = analysis.header
    experts = sum(shape.experts for shape in header.layers)
    dead = sum(summary.dead_experts for summary in summaries)
    tiles = [
        ("Dead experts", str(dead), f"of {experts} in all layers"),
        (
            "Expert load entropy",
            _number(_mean(summaries, "load_entropy")),
            "mean over layers; 1 is even",
        ),
    ]
    if any(shape.neurons for shape in header.layers):
        tiles += [
            (
                "Dead neurons",
                _percent(_mean(summaries, "dead_neurons")),
                "of experts that had tokens",
            ),
            (
                "Kept neurons shared",
                _percent(_mean(summaries, "neuron_adjacent")),
                "by adjacent tokens in one expert; independent tokens "
                f"{_percent(_mean(summaries, 'neuron_adjacent_by_load'))}",
            ),
        ]
    return tiles


def _over_checkpoints(
    page: Page, analysis: Analysis, summaries: Sequence[Sequence[LayerSummary]]
) -> None:
    page.heading("Over checkpoints", "Means over layers, with a band from lowest to highest.")
    places, label = analysis.places()
    xs = np.asarray(places, dtype=np.int64)
    page.open_grid()
    earlier = analysis.checkpoints[:-1]
    top_k = min(shape.top_k for shape in analysis.header.layers)
    curves = []
    for k in range(1, top_k + 1):
        rows = [
            [s[k - 1] for layer in one.layers if (s := layer.experts.saturation_K) is not None]
            for one in earlier
        ]
        if np.isfinite(rows).any():
            curves.append(_curve(xs[:-1], rows, f"top {k}", k - 1, band=False))
    by_load = [[layer.expert_saturation_by_load for layer in one] for one in summaries[:-1]]
    curves.append(_curve(xs[:-1], by_load, f"top {top_k}, {_INDEPENDENT}", top_k, band=False))
    page.chart(
        "Router saturation",
        curves,
        note="experts of a token that the last checkpoint also takes, over k",
        x_label=label,
    )
    charts = (
        ("Neuron saturation", ("neuron_saturation", "neuron_saturation_by_load")),
        ("Dead neurons", ("dead_neurons",)),
        ("Expert load entropy", ("load_entropy",)),
        ("Token specialisation", ("token_specialisation", "token_specialisation_even")),
        ("Kept neurons shared by adjacent tokens", ("neuron_adjacent", "neuron_adjacent_by_load")),
    )
    for title, keys in charts:
        drawn = []
        for color, key in enumerate(keys):
            saturating = key.startswith("neuron_saturation")
            rows = [
                [getattr(layer, key) for layer in one]
                for one in (summaries[:-1] if saturating else summaries)
            ]
            if np.isfinite(rows).any():
                own = xs[:-1] if saturating else xs
                drawn.append(_curve(own, rows, _NAMES.get(key, key), color, band=color == 0))
        if drawn:
            page.chart(title, drawn, x_label=label)
    page.close_grid()


_INDEPENDENT = "independent choices of the same loads"
_NAMES = {
    "neuron_saturation": "kept neurons in common",
    "neuron_saturation_by_load": _INDEPENDENT,
    "neuron_adjacent": "kept neurons in common",
    "neuron_adjacent_by_load": "independent tokens of the same loads",
    "token_specialisation": "largest share of a token, mean",
    "token_specialisation_even": "the same without specialisation",
    "domain_specialisation": "distance of domains",
    "load_entropy": "experts",
    "neuron_load_entropy": "neurons",
    "dead_neurons": "dead neurons",
    "expert_adjacent": "experts in common",
    "expert_adjacent_by_load": "independent tokens of the same loads",
}


def _curve(
    xs: npt.NDArray[np.int64],
    rows: Sequence[Sequence[float]],
    name: str,
    color: int,
    *,
    band: bool,
) -> Curve:
    """Returns the curve of the mean over layers; its band is from lowest to highest layer."""
    values = np.asarray(rows, dtype=np.float64)
    known = np.isfinite(values)
    some = known.any(axis=1)
    counts = np.maximum(known.sum(axis=1), 1)
    mean = np.where(some, np.where(known, values, 0).sum(axis=1) / counts, np.nan)
    low = np.where(some, np.where(known, values, np.inf).min(axis=1), np.nan)
    high = np.where(some, np.where(known, values, -np.inf).max(axis=1), np.nan)
    several = band and values.shape[1] > 1
    return Curve(
        Series(xs, mean),
        name,
        color,
        low=low if several else None,
        high=high if several else None,
    )


def _over_layers(page: Page, final: TraceStatistics, summaries: Sequence[LayerSummary]) -> None:
    page.heading("Over layers", f"Of {final.name}.")
    xs = np.asarray([layer.shape.layer for layer in final.layers], dtype=np.int64)
    charts = (
        ("Entropy of the load", "1 is even", ("load_entropy", "neuron_load_entropy")),
        (
            "Specialisation of experts",
            "",
            ("token_specialisation", "token_specialisation_even", "domain_specialisation"),
        ),
        (
            "Kept neurons shared by adjacent tokens",
            "in the experts that both go to",
            ("neuron_adjacent", "neuron_adjacent_by_load"),
        ),
        (
            "Experts shared by adjacent tokens",
            "",
            ("expert_adjacent", "expert_adjacent_by_load"),
        ),
        ("Dead neurons", "share of the neurons of experts that had tokens", ("dead_neurons",)),
    )
    page.open_grid()
    for title, note, keys in charts:
        curves = []
        for color, key in enumerate(keys):
            values = np.asarray([getattr(one, key) for one in summaries], dtype=np.float64)
            if np.isfinite(values).any():
                curves.append(Curve(Series(xs, values), _NAMES.get(key, key), color))
        if curves:
            page.chart(title, curves, note=note, zero=True, x_label="layer")
    _unions(page, final)
    page.close_grid()


def _unions(page: Page, final: TraceStatistics) -> None:
    """Draws what chunks of adjacent tokens keep between them, the mean over layers."""
    found = [union_shares(layer) for layer in final.layers if layer.neurons is not None]
    if not found:
        return
    xs = np.asarray(CHUNK_LENGTHS, dtype=np.int64)
    names = ("adjacent tokens", "independent tokens of the same loads")
    curves = [
        Curve(Series(xs, np.mean(parts, axis=0)), name, color)
        for color, (name, parts) in enumerate(zip(names, zip(*found, strict=True), strict=True))
    ]
    page.chart(
        "Neurons that any of L tokens keeps",
        [curve for curve in curves if np.isfinite(curve.series.values).any()],
        note="share of a layer's neurons: what a step of a batch, or of guessed tokens, reads",
        zero=True,
        x_label="tokens L",
    )


def _data(analysis: Analysis, max_numbers: int) -> dict[str, Any]:
    """Returns what the page's script explores.

    Parts of layers beyond ``max_numbers`` are left out, the earliest checkpoints first.
    """
    texts: dict[int, int] = {}
    parts: dict[str, Any] = {}
    room = max_numbers
    last = len(analysis.checkpoints) - 1
    # The final checkpoint first: what does not fit is of the earliest.
    for number in range(last, -1, -1):
        checkpoint = analysis.checkpoints[number]
        for index, layer in enumerate(checkpoint.layers):
            room -= _size(layer, len(analysis.header.domains))
            if room >= 0:
                parts[f"{number}:{index}"] = _part(analysis, checkpoint, layer, texts)
    return {
        "checkpoints": [
            {"name": one.name, "tokens": one.vocabulary.tokens} for one in analysis.checkpoints
        ],
        "layers": [
            {"layer": s.layer, "experts": s.experts, "neurons": s.neurons, "kept": s.kept}
            for s in analysis.header.layers
        ],
        "domains": list(analysis.header.domains),
        "loads": [
            [
                _rounded(divide(layer.experts.tokens_E, one.vocabulary.tokens))
                for layer in one.layers
            ]
            for one in analysis.checkpoints
        ],
        "tokens": [[token, analysis.text(token)] for token in texts],
        "parts": parts,
    }


def _size(layer: LayerStatistics, domains: int) -> int:
    """Returns how many numbers the part of a layer holds."""
    experts, neurons = layer.shape.experts, layer.shape.neurons
    pairs = 0
    if layer.neurons is not None:
        pairs = sum(one.counts_MM.size for one in layer.neurons.together)
    return experts * (experts + domains + 3 * _TOKENS_SHOWN + 5 * neurons) + pairs


def _part(
    analysis: Analysis,
    checkpoint: TraceStatistics,
    layer: LayerStatistics,
    texts: dict[int, int],
) -> dict[str, Any]:
    """Returns the part of one layer of a checkpoint.

    ``texts`` gives tokens their places in the page; those that it lacks are added.
    """
    vocabulary, experts = checkpoint.vocabulary, layer.experts

    def place(rank: int) -> int:
        token = int(vocabulary.ids_V[rank])
        return texts.setdefault(token, len(texts))

    shares_VE = divide(experts.token_VE, vocabulary.counts_V[:, None])
    tokens = []
    for expert in range(layer.shape.experts):
        shares_V = shares_VE[:, expert]
        order = np.argsort(-shares_V, kind="stable")[:_TOKENS_SHOWN]
        tokens.append(
            [
                [place(rank), _round(shares_V[rank]), int(vocabulary.counts_V[rank])]
                for rank in order.tolist()
                if shares_V[rank] > 0
            ]
        )
    domain_tokens_D = vocabulary.domain_tokens_D
    part: dict[str, Any] = {
        "together": _rounded(conditional(experts.together_EE).reshape(-1)),
        "domains": [_rounded(row) for row in divide(experts.domain_DE, domain_tokens_D[:, None])],
        "tokens": tokens,
        "weights": _rounded(experts.weight_E),
    }
    if layer.neurons is None:
        return part
    neurons = layer.neurons
    by_token, by_domain = neurons.by_token, neurons.by_domain
    loads_EF = divide(neurons.kept_EF, experts.tokens_E[:, None])
    part["neurons"] = [
        {
            "load": _rounded(loads_EF[expert]),
            "token": [
                place(rank) if rank >= 0 else -1 for rank in by_token.group_EF[expert].tolist()
            ],
            "tokenShare": _rounded(by_token.share_EF[expert]),
            "domain": by_domain.group_EF[expert].tolist(),
            "domainShare": _rounded(by_domain.share_EF[expert]),
        }
        for expert in range(layer.shape.experts)
    ]
    part["pairs"] = {
        str(one.expert): {
            "neurons": one.neurons_M.tolist(),
            "values": _rounded(conditional(one.counts_MM).reshape(-1)),
        }
        for one in neurons.together
    }
    part["adjacent"] = _rounded(divide(neurons.adjacent.shared_E, neurons.adjacent.possible_E))
    if neurons.saturation is not None:
        part["saturation"] = _rounded(
            divide(neurons.saturation.shared_E, neurons.saturation.possible_E)
        )
    return part


def _round(value: float) -> float | None:
    """Rounds to three significant digits; NaN and infinities become None, for JSON."""
    return float(f"{value:.3g}") if math.isfinite(value) else None


def _rounded(values: npt.NDArray[np.floating]) -> list[float | None]:
    return [_round(value) for value in values.tolist()]


def _mean(summaries: Sequence[LayerSummary], key: str) -> float:
    values = np.asarray([getattr(summary, key) for summary in summaries], dtype=np.float64)
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan


def _percent(value: float) -> str:
    return f"{value:.1%}" if math.isfinite(value) else "-"


def _number(value: float) -> str:
    return format_count(value) if math.isfinite(value) else "-"
