"""Writes statistics: summaries to ``analysis.json``, everything to Parquet tables.

Shape suffixes: E experts, F neurons of an expert, D domains, V frequent tokens, M chosen neurons.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mone_megatron.lab.routing.counting import conditional, divide
from mone_megatron.lab.routing.statistics import (
    LayerStatistics,
    Limits,
    TraceStatistics,
)
from mone_megatron.lab.routing.summary import (
    LayerSummary,
    summarise,
    union_shares,
)
from mone_megatron.lab.routing.trace import TraceHeader
from mone_megatron.mone.chunk_unions import CHUNK_LENGTHS
from mone_megatron.report.files import check_output
from mone_megatron.report.formatting import text_table
from mone_megatron.whole_files import write_json

JSON_FILE = "analysis.json"
Columns = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Analysis:
    """Holds everything that was measured, the reference of saturation last.

    Attributes:
        checkpoints: the statistics.
        header: of the last checkpoint's trace: layers, domains, selection, texts of tokens.
        limits: what the statistics were made with.
        how: what the user asked for, to be written beside the numbers.
    """

    checkpoints: Sequence[TraceStatistics]
    header: TraceHeader
    limits: Limits
    how: Mapping[str, Any]

    @cached_property
    def summaries(self) -> list[list[LayerSummary]]:
        """Returns the summary of each layer, for each checkpoint."""
        final = self.checkpoints[-1]
        return [
            [
                summarise(
                    layer,
                    checkpoint.vocabulary,
                    None if checkpoint is final else last,
                )
                for layer, last in zip(checkpoint.layers, self._last(checkpoint), strict=True)
            ]
            for checkpoint in self.checkpoints
        ]

    def _last(self, checkpoint: TraceStatistics) -> Sequence[LayerStatistics]:
        final = self.checkpoints[-1]
        return final.layers if len(final.layers) == len(checkpoint.layers) else checkpoint.layers

    def places(self) -> tuple[list[int], str]:
        """Returns where the checkpoints stand on an axis, and what the axis counts.

        It counts steps where all have one and they ascend, else checkpoints from 1.
        """
        steps = [one.step for one in self.checkpoints if one.step is not None]
        if len(steps) == len(self.checkpoints) and sorted(set(steps)) == steps:
            return steps, "step"
        return list(range(1, len(self.checkpoints) + 1)), "checkpoint, in the order given"

    def text(self, token: int) -> str:
        """Returns what a token spells, or its number where that is not known."""
        return self.header.texts.get(token, str(token))


# Of how an analysis was made: where and how fast changes none of its numbers.
_PLACEMENT = frozenset({"output", "trace", "device"})


def check_folder(folder: Path, how: Mapping[str, Any]) -> None:
    """Checks that an analysis may go into a folder: a new or empty one, or one with the same.

    Args:
        folder: need not be there.
        how: what the user asks for, as :attr:`Analysis.how`.

    Raises:
        ValueError: nothing can be written there, or it holds something else; one line.
    """
    check_output(folder, JSON_FILE)
    path = folder / JSON_FILE
    if not path.exists():
        return
    try:
        before = json.loads(path.read_bytes())["how"]
        known = {name: before[name] for name in how}
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"{path}: is damaged ({error!r}); give another --output") from None
    for name in sorted(how.keys() - _PLACEMENT):
        if known[name] != how[name]:
            raise ValueError(
                f"--output: {folder} holds an analysis with other options: {name} was "
                f"{known[name]!r} and is {how[name]!r}; give another folder"
            )


def write_analysis(analysis: Analysis, folder: Path) -> list[Path]:
    """Writes ``analysis.json`` and the tables into ``folder`` and returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [write_json(folder / JSON_FILE, as_json(analysis), indent=1)]
    paths.append(folder / "layers.parquet")
    pq.write_table(_layers(analysis), paths[-1], compression="zstd")
    for name, rows in _TABLES.items():
        parts = [
            pa.table({**_place(checkpoint, layer, rows_of_layer), **rows_of_layer})
            for checkpoint in analysis.checkpoints
            for layer in checkpoint.layers
            if (rows_of_layer := rows(analysis, checkpoint, layer)) is not None
        ]
        if parts:
            path = folder / f"{name}.parquet"
            pq.write_table(pa.concat_tables(parts), path, compression="zstd")
            paths.append(path)
    return paths


def as_json(analysis: Analysis) -> dict[str, Any]:
    """Returns the summaries of all layers of all checkpoints and what they are of, as for JSON."""
    header = analysis.header
    selection = header.selection
    return {
        "format": "mone_megatron.routing_analysis",
        "version": 1,
        "how": dict(analysis.how),
        "limits": dataclasses.asdict(analysis.limits),
        "domains": list(header.domains),
        "beginning": header.beginning,
        "selection": None if selection is None else dataclasses.asdict(selection),
        "checkpoints": [
            {
                "name": checkpoint.name,
                "step": checkpoint.step,
                "tokens": checkpoint.vocabulary.tokens,
                "token_types": checkpoint.vocabulary.types,
                "layers": [
                    {
                        **dataclasses.asdict(layer.shape),
                        **dataclasses.asdict(summary),
                        "expert_saturation_top": _saturation(layer),
                        "chunk_unions": _unions(layer),
                    }
                    for layer, summary in zip(checkpoint.layers, summaries, strict=True)
                ],
            }
            for checkpoint, summaries in zip(analysis.checkpoints, analysis.summaries, strict=True)
        ],
    }


def _saturation(layer: LayerStatistics) -> list[float | None] | None:
    """Returns the saturation of the top 1, 2, ... K experts; None for what was not measured."""
    saturation_K = layer.experts.saturation_K
    if saturation_K is None:
        return None
    return [float(value) if np.isfinite(value) else None for value in saturation_K]


def _unions(layer: LayerStatistics) -> dict[str, list[float | None]] | None:
    """Returns what chunks of adjacent tokens keep, for each length; None without neurons."""
    if layer.neurons is None:
        return None
    shares_L, by_load_L = union_shares(layer)
    return {
        "tokens": list(CHUNK_LENGTHS),
        "share": [float(one) if np.isfinite(one) else None for one in shares_L],
        "share_by_load": [float(one) if np.isfinite(one) else None for one in by_load_L],
    }


def _layers(analysis: Analysis) -> pa.Table:
    """Returns the table of summaries, a row a layer."""
    return pa.Table.from_pylist(
        [
            {
                "checkpoint": checkpoint.name,
                "step": checkpoint.step,
                **dataclasses.asdict(layer.shape),
                **dataclasses.asdict(summary),
            }
            for checkpoint, summaries in zip(analysis.checkpoints, analysis.summaries, strict=True)
            for layer, summary in zip(checkpoint.layers, summaries, strict=True)
        ]
    )


def _place(checkpoint: TraceStatistics, layer: LayerStatistics, rows: Columns) -> dict[str, Any]:
    count = len(next(iter(rows.values())))
    steps = pa.nulls(count, pa.int64())
    if checkpoint.step is not None:
        steps = pa.array(np.full(count, checkpoint.step, np.int64))
    return {
        "checkpoint": pa.array([checkpoint.name] * count, pa.string()),
        "step": steps,
        "layer": np.full(count, layer.shape.layer, np.int32),
    }


def _experts(
    analysis: Analysis, checkpoint: TraceStatistics, layer: LayerStatistics
) -> Columns | None:
    """Returns the columns of the table of experts, a row an expert."""
    experts = layer.experts
    columns: Columns = {
        "expert": np.arange(layer.shape.experts),
        "tokens": experts.tokens_E,
        "load": divide(experts.tokens_E, checkpoint.vocabulary.tokens),
        "mean_weight": experts.weight_E,
    }
    if layer.neurons is not None:
        neurons = layer.neurons
        dead_E = (neurons.kept_EF == 0).sum(axis=1)
        columns["dead_neurons"] = np.where(experts.tokens_E > 0, dead_E, -1)
        columns["neuron_adjacent"] = divide(neurons.adjacent.shared_E, neurons.adjacent.possible_E)
        saturation_E = np.full(layer.shape.experts, np.nan)
        if neurons.saturation is not None:
            saturation_E = divide(neurons.saturation.shared_E, neurons.saturation.possible_E)
        columns["neuron_saturation"] = saturation_E
    return columns


def _experts_together(
    analysis: Analysis, checkpoint: TraceStatistics, layer: LayerStatistics
) -> Columns | None:
    """Returns the columns of the table of co-activations, a row an ordered pair of experts."""
    counts_EE = layer.experts.together_EE
    first, second = np.indices(counts_EE.shape).reshape(2, -1)
    return {
        "expert": first,
        "other": second,
        "tokens": counts_EE.reshape(-1),
        "coactivation": conditional(counts_EE).reshape(-1),
    }


def _expert_domains(
    analysis: Analysis, checkpoint: TraceStatistics, layer: LayerStatistics
) -> Columns | None:
    """Returns the columns of the table of domains, a row a domain and expert."""
    domain_DE = layer.experts.domain_DE
    domain, expert = np.indices(domain_DE.shape).reshape(2, -1)
    shares_DE = divide(domain_DE, checkpoint.vocabulary.domain_tokens_D[:, None])
    return {
        "domain": np.asarray(analysis.header.domains, dtype=object)[domain],
        "expert": expert,
        "tokens": domain_DE.reshape(-1),
        "share": shares_DE.reshape(-1),
    }


def _expert_tokens(
    analysis: Analysis, checkpoint: TraceStatistics, layer: LayerStatistics
) -> Columns | None:
    """Returns a row for each frequent token and expert that it was routed to.

    It is None where no token is frequent, or token ids are not known.
    """
    token_VE = layer.experts.token_VE
    if not len(token_VE):
        return None
    place, expert = np.nonzero(token_VE)
    ids_V, counts_V = checkpoint.vocabulary.ids_V, checkpoint.vocabulary.counts_V
    return {
        "token_id": ids_V[place],
        "token": _texts(analysis, checkpoint)[place],
        "occurrences": counts_V[place],
        "expert": expert,
        "share": token_VE[place, expert] / counts_V[place],
    }


def _neurons(
    analysis: Analysis, checkpoint: TraceStatistics, layer: LayerStatistics
) -> Columns | None:
    """Returns a row a neuron, with the token and domain that keep it most above its usual share.

    It is None when the trace holds no neurons.
    """
    if layer.neurons is None:
        return None
    kept_EF = layer.neurons.kept_EF
    expert, neuron = np.indices(kept_EF.shape).reshape(2, -1)
    tokens, domains = layer.neurons.by_token, layer.neurons.by_domain
    token = tokens.group_EF.reshape(-1)
    ids_V = np.append(checkpoint.vocabulary.ids_V, -1)
    names = np.append(np.asarray(analysis.header.domains, dtype=object), [None])
    return {
        "expert": expert,
        "neuron": neuron,
        "kept": kept_EF.reshape(-1),
        "load": divide(kept_EF, layer.experts.tokens_E[:, None]).reshape(-1),
        "token_id": ids_V[token],
        "token": np.append(_texts(analysis, checkpoint), [None])[token],
        "token_share": tokens.share_EF.reshape(-1),
        "token_excess": tokens.excess_EF.reshape(-1),
        "domain": names[domains.group_EF.reshape(-1)],
        "domain_share": domains.share_EF.reshape(-1),
        "domain_excess": domains.excess_EF.reshape(-1),
    }


def _neurons_together(
    analysis: Analysis, checkpoint: TraceStatistics, layer: LayerStatistics
) -> Columns | None:
    """Returns a row for each ordered pair of chosen neurons of an expert.

    It is None where none were counted.
    """
    if layer.neurons is None or not layer.neurons.together:
        return None
    parts = []
    for together in layer.neurons.together:
        first, second = np.indices(together.counts_MM.shape).reshape(2, -1)
        parts.append(
            {
                "expert": np.full(len(first), together.expert),
                "neuron": together.neurons_M[first],
                "other": together.neurons_M[second],
                "tokens": together.counts_MM.reshape(-1),
                "coactivation": conditional(together.counts_MM).reshape(-1),
            }
        )
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def _texts(analysis: Analysis, checkpoint: TraceStatistics) -> npt.NDArray[np.object_]:
    """Returns what the frequent tokens spell, as ``[V]`` strings."""
    return np.asarray(
        [analysis.text(int(token)) for token in checkpoint.vocabulary.ids_V], dtype=object
    )


def _chunk_unions(
    analysis: Analysis, checkpoint: TraceStatistics, layer: LayerStatistics
) -> Columns | None:
    """Returns a row for each length of a chunk; None when the trace holds no neurons."""
    if layer.neurons is None:
        return None
    shares_L, by_load_L = union_shares(layer)
    return {
        "tokens": np.asarray(CHUNK_LENGTHS),
        "chunks": layer.neurons.unions.chunks_L,
        "share": shares_L,
        "share_by_load": by_load_L,
    }


_Rows = Callable[[Analysis, TraceStatistics, LayerStatistics], Columns | None]
_TABLES: dict[str, _Rows] = {
    "experts": _experts,
    "experts_together": _experts_together,
    "expert_domains": _expert_domains,
    "expert_tokens": _expert_tokens,
    "neurons": _neurons,
    "neurons_together": _neurons_together,
    "chunk_unions": _chunk_unions,
}


def text_report(analysis: Analysis) -> str:
    """Returns a table for the terminal, a row a layer of the last checkpoint."""
    final, summaries = analysis.checkpoints[-1], analysis.summaries[-1]
    header = ["layer", "load entropy", "max/mean", "dead experts", "token spec.", "adjacent"]
    keys = ["load_entropy", "load_max_over_mean", "dead_experts", "token_specialisation"]
    keys.append("expert_adjacent")
    if final.layers[0].neurons is not None:
        header += ["neuron entropy", "dead neurons", "adjacent neurons", "(by load)"]
        keys += [
            "neuron_load_entropy",
            "dead_neurons",
            "neuron_adjacent",
            "neuron_adjacent_by_load",
        ]
    rows = [
        [str(layer.shape.layer), *(_cell(getattr(summary, key)) for key in keys)]
        for layer, summary in zip(final.layers, summaries, strict=True)
    ]
    title = f"{final.name}, {final.vocabulary.tokens:,} tokens"
    if analysis.header.beginning:
        title += f"; {analysis.header.beginning}"
    return f"{title}\n\n{text_table(header, rows)}"


def _cell(value: float) -> str:
    if isinstance(value, int):
        return str(value)
    return f"{value:.3f}" if math.isfinite(value) else "-"
