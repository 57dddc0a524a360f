"""Summarises the counts of a layer in a few numbers.

Shape suffixes: E experts, F neurons of an expert, D domains, V frequent tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mone_megatron.lab.routing.counting import (
    KeptOverlap,
    divide,
    entropy_share,
)
from mone_megatron.lab.routing.statistics import (
    LayerStatistics,
    Vocabulary,
)
from mone_megatron.mone.chunk_unions import CHUNK_LENGTHS
from mone_megatron.report.stats import FloatArray


@dataclass(frozen=True)
class LayerSummary:
    """Holds a layer in a few numbers; they are NaN where there is nothing to measure.

    Attributes:
        load_entropy: entropy of the experts' loads, 1 when even.
        load_max_over_mean: largest over mean load of the experts, 1 when even.
        dead_experts: experts that no token was routed to.
        expert_saturation: share of the K experts that the final checkpoint also takes.
        expert_saturation_by_load: what two independent choices with these loads would share.
        expert_adjacent: share of the K experts that the next token also takes.
        expert_adjacent_by_load: what two independent tokens with these loads would share.
        token_specialisation: largest share of a frequent token's occurrences that goes to one
            expert; mean over occurrences.
        token_specialisation_even: the same if every token were routed as all are together.
        domain_specialisation: how far a domain's loads are from those of all text: half the sum
            of the differences of the shares (0 same, 1 disjoint); mean over domains.
        neuron_load_entropy: as a run's ``mone/load_entropy``: mean over experts that had tokens.
        neuron_load_max_over_mean: likewise.
        dead_neurons: share of neurons that no token kept, in experts that had tokens.
        neuron_saturation: kept neurons shared with the final checkpoint, in experts that both
            route the token to.
        neuron_saturation_by_load: what two independent choices with these loads would share.
        neuron_adjacent: kept neurons shared with the next token, in experts that both go to.
        neuron_adjacent_by_load: what two independent tokens with these loads would share.
        neuron_token_specialisation: largest difference between the share of a frequent token's
            occurrences in the expert that keep the neuron and that of all tokens; mean.
        neuron_domain_specialisation: between a domain and all text, likewise.
    """

    load_entropy: float
    load_max_over_mean: float
    dead_experts: int
    expert_saturation: float
    expert_saturation_by_load: float
    expert_adjacent: float
    expert_adjacent_by_load: float
    token_specialisation: float
    token_specialisation_even: float
    domain_specialisation: float
    neuron_load_entropy: float = np.nan
    neuron_load_max_over_mean: float = np.nan
    dead_neurons: float = np.nan
    neuron_saturation: float = np.nan
    neuron_saturation_by_load: float = np.nan
    neuron_adjacent: float = np.nan
    neuron_adjacent_by_load: float = np.nan
    neuron_token_specialisation: float = np.nan
    neuron_domain_specialisation: float = np.nan


def summarise(
    layer: LayerStatistics,
    vocabulary: Vocabulary,
    final: LayerStatistics | None = None,
) -> LayerSummary:
    """Summarises a layer; ``final`` is the same layer of the final checkpoint, if compared."""
    experts, neurons = layer.experts, layer.neurons
    tokens_E = experts.tokens_E
    token_shares_VE = divide(experts.token_VE, vocabulary.counts_V[:, None])
    saturation = experts.saturation_K[-1] if experts.saturation_K is not None else np.nan
    domain_shares_DE = divide(experts.domain_DE, experts.domain_DE.sum(axis=1, keepdims=True))
    shares_E = divide(tokens_E, tokens_E.sum())
    apart_D = np.abs(domain_shares_DE - shares_E).sum(axis=1) / 2
    frequent = len(vocabulary.ids_V) > 0
    several = len(apart_D) > 1
    values = {
        "load_entropy": float(entropy_share(tokens_E)),
        "load_max_over_mean": float(divide(tokens_E.max(), tokens_E.mean())),
        "dead_experts": int((tokens_E == 0).sum()),
        "expert_saturation": float(saturation),
        "expert_saturation_by_load": np.nan
        if final is None
        else _expected_experts(layer, final, vocabulary.tokens),
        "expert_adjacent": experts.adjacent,
        "expert_adjacent_by_load": np.nan
        if np.isnan(experts.adjacent)
        else _expected_experts(layer, layer, vocabulary.tokens),
        "token_specialisation": float(
            np.average(token_shares_VE.max(axis=1), weights=vocabulary.counts_V)
        )
        if frequent
        else np.nan,
        "token_specialisation_even": float(divide(tokens_E.max(), vocabulary.tokens))
        if frequent
        else np.nan,
        "domain_specialisation": float(np.nanmean(apart_D)) if several else np.nan,
    }
    if neurons is None or not (tokens_E > 0).any():
        return LayerSummary(**values)  # type: ignore[arg-type]
    used = tokens_E > 0
    kept_EF = neurons.kept_EF[used]
    loads_EF = divide(neurons.kept_EF, tokens_E[:, None])
    by_load = np.nan
    if neurons.saturation is not None and final is not None and final.neurons is not None:
        theirs_EF = divide(final.neurons.kept_EF, final.experts.tokens_E[:, None])
        by_load = _expected_share(neurons.saturation, loads_EF, theirs_EF)
    values |= {
        "neuron_load_entropy": float(entropy_share(kept_EF).mean()),
        "neuron_load_max_over_mean": float((kept_EF.max(axis=1) / kept_EF.mean(axis=1)).mean()),
        "dead_neurons": float((kept_EF == 0).mean()),
        "neuron_saturation": _share(neurons.saturation),
        "neuron_saturation_by_load": by_load,
        "neuron_adjacent": _share(neurons.adjacent),
        "neuron_adjacent_by_load": _expected_share(neurons.adjacent, loads_EF, loads_EF),
        "neuron_token_specialisation": _mean(neurons.by_token.excess_EF),
        "neuron_domain_specialisation": _mean(neurons.by_domain.excess_EF) if several else np.nan,
    }
    return LayerSummary(**values)  # type: ignore[arg-type]


def union_shares(layer: LayerStatistics) -> tuple[FloatArray, FloatArray]:
    """Returns the share of a layer's neurons that any of L adjacent tokens keeps, of each length.

    It is what a step of L tokens has to read: of a batch, or of tokens that were guessed ahead.

    Returns:
        ``[L]`` each, for :data:`~mone_megatron.lab.routing.counting.CHUNK_LENGTHS`, NaN where no
        window is as long: the share, and that of L independent tokens of the same loads.
    """
    assert layer.neurons is not None
    unions, kept_EF = layer.neurons.unions, layer.neurons.kept_EF
    shares_L = divide(unions.kept_L, unions.chunks_L * kept_EF.size)
    tokens = layer.experts.tokens_E.sum() / layer.shape.top_k
    left_out_EF = 1 - divide(kept_EF, tokens)
    by_load_L = np.asarray([1 - (left_out_EF**length).mean() for length in CHUNK_LENGTHS])
    return shares_L, np.where(unions.chunks_L > 0, by_load_L, np.nan)


def _expected_experts(first: LayerStatistics, second: LayerStatistics, tokens: int) -> float:
    """Returns the share of K experts that independent choices with these loads have in common."""
    common = (first.experts.tokens_E / tokens) @ (second.experts.tokens_E / tokens)
    return float(common / second.shape.top_k)


def _mean(values: npt.NDArray[np.floating]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean(dtype=np.float64)) if len(known) else np.nan


def _share(overlap: KeptOverlap | None) -> float:
    if overlap is None:
        return np.nan
    return float(divide(overlap.shared_E.sum(), overlap.possible_E.sum()))


def _expected_share(overlap: KeptOverlap, first_EF: FloatArray, second_EF: FloatArray) -> float:
    """Returns the share of kept neurons that independent choices with these loads have in common.

    It is over the same pairs as ``overlap``.
    """
    expected_E = (first_EF * second_EF).sum(axis=1)
    some = overlap.pairs_E > 0
    expected = (overlap.pairs_E[some] * expected_E[some]).sum()
    return float(divide(expected, overlap.possible_E[some].sum()))
