"""Measures a trace's experts and neurons, layer by layer, beside the final checkpoint's trace.

In memory are the ids of the whole text, one layer of one shard, the tables of one layer, and 32
bytes a neuron of the result. What grows with the vocabulary is bounded: experts are told apart by
the ``Limits.expert_tokens`` most frequent tokens and neurons by the ``Limits.neuron_tokens`` most
frequent, fewer where the table of neurons would pass ``Limits.table_bytes``; neurons are counted
together for the most kept of the busiest experts.

Shape suffixes: N tokens of a shard, K experts of a token, E experts, F neurons of an expert, B
bytes of bits, D domains, V frequent tokens, M chosen neurons, X chosen experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mone_megatron.lab.routing.counting import (
    ChunkUnions,
    Counts,
    KeptOverlap,
    chunk_unions,
    coactivation_counts,
    divide,
    expert_counts,
    grouped_expert_counts,
    kept_counts,
    kept_overlap,
    kept_together,
    shared_experts,
)
from mone_megatron.lab.routing.excess import Excess, largest_excess
from mone_megatron.lab.routing.trace import (
    UNKNOWN_TOKEN,
    Int32Array,
    LayerShape,
    Routing,
    Tokens,
    Trace,
    check_same_text,
)
from mone_megatron.report.stats import FloatArray


@dataclass(frozen=True)
class Limits:
    """Holds what bounds memory and output.

    Attributes:
        expert_tokens: token types by which experts are told apart.
        neuron_tokens: token types by which neurons are told apart.
        min_count: occurrences below which a share is not given.
        neurons_together: neurons of an expert, the most kept, that are counted together.
        experts_together: experts of a layer, the busiest, for which that is done.
        table_bytes: largest size of the counts of tokens by neurons.
    """

    expert_tokens: int = 1000
    neuron_tokens: int = 128
    min_count: int = 8
    neurons_together: int = 32
    experts_together: int = 8
    table_bytes: int = 1 << 28


@dataclass(frozen=True)
class Vocabulary:
    """Holds the counts of the tokens of a trace's text.

    Attributes:
        ids_V: the most frequent tokens that occur at least ``Limits.min_count`` times, the most
            frequent first (equally frequent ones by id); empty when the trace holds no token ids.
        counts_V: how often.
        tokens: of the whole trace.
        types: different tokens in it.
        domain_tokens_D: tokens of each domain.
    """

    ids_V: Int32Array
    counts_V: Counts
    tokens: int
    types: int
    domain_tokens_D: Counts


@dataclass(frozen=True)
class ExpertStatistics:
    """Holds what was counted of the experts of a layer.

    Attributes:
        tokens_E: routed to each.
        weight_E: mean weight the router gave it; NaN without tokens or weights.
        together_EE: tokens routed to both, to i on the diagonal.
        domain_DE: tokens of each domain routed to each.
        token_VE: occurrences of each frequent token routed to each.
        saturation_K: mean |S & S_final| / k of the top k experts, k from 1 to K; None without a
            final checkpoint. Only the last entry when a trace has no order.
        adjacent: the same of all K, with the next token in place of the final checkpoint; NaN
            without any.
    """

    tokens_E: Counts
    weight_E: FloatArray
    together_EE: Counts
    domain_DE: Counts
    token_VE: Counts
    saturation_K: FloatArray | None
    adjacent: float


@dataclass(frozen=True)
class Together:
    """Holds how often neurons of one expert are kept together.

    Attributes:
        expert: its number.
        neurons_M: the most kept, in that order.
        counts_MM: tokens that keep both, that keep i on the diagonal.
    """

    expert: int
    neurons_M: npt.NDArray[np.int64]
    counts_MM: Counts


@dataclass(frozen=True)
class NeuronStatistics:
    """Holds what was counted of the neurons of a layer's experts.

    Attributes:
        kept_EF: tokens that keep each.
        by_token: the token that keeps each most above its usual share, as its place in
            ``Vocabulary.ids_V``.
        by_domain: the domain, likewise.
        told_apart: how many of the most frequent tokens ``by_token`` looked at.
        together: neurons kept together, of the busiest experts.
        saturation: kept neurons shared with the final checkpoint, in the experts that both route a
            token to; None without one.
        adjacent: kept neurons shared with the next token, in the experts that both are routed to.
        unions: neurons that any of several adjacent tokens keeps.
    """

    kept_EF: Counts
    by_token: Excess
    by_domain: Excess
    told_apart: int
    together: tuple[Together, ...]
    saturation: KeptOverlap | None
    adjacent: KeptOverlap
    unions: ChunkUnions


@dataclass(frozen=True)
class LayerStatistics:
    """Holds the statistics of one layer; ``neurons`` is None when the trace holds none."""

    shape: LayerShape
    experts: ExpertStatistics
    neurons: NeuronStatistics | None


@dataclass(frozen=True)
class TraceStatistics:
    """Holds the statistics of one checkpoint: its text's counts and its layers."""

    name: str
    step: int | None
    vocabulary: Vocabulary
    layers: tuple[LayerStatistics, ...]


def measure(
    trace: Trace,
    final: Trace | None = None,
    limits: Limits | None = None,
    progress: Callable[[int], None] = lambda layers: None,
) -> TraceStatistics:
    """Measures a trace: its text, and the experts and neurons of each layer.

    Args:
        trace: of one checkpoint.
        final: of the final one, on the same text; None leaves saturation out.
        limits: None for the usual.
        progress: told with each layer.

    Raises:
        ValueError: a shard is damaged, or the final checkpoint's trace is of another text or model.
    """
    limits = limits or Limits()
    if final is not None:
        check_same_text(trace, final)
    texts = list(trace.texts())
    vocabulary = _vocabulary(texts, len(trace.header.domains), limits)
    layers = []
    for shape in trace.header.layers:
        counter = _LayerCounter(shape, vocabulary, limits, ordered=trace.header.ordered)
        others = None if final is None else final.routings(shape.layer)
        for text, routing in zip(texts, trace.routings(shape.layer), strict=True):
            other = None
            if others is not None:
                other = next(others, None)
                if other is None or len(other.experts_NK) != len(text):
                    raise ValueError(
                        f"{trace.folder}: its shards do not lie as those of the final checkpoint; "
                        "record both with the same --batch-size"
                    )
            counter.add(text, routing, other)
        together = _together(trace, shape, counter.kept_EF, limits)
        layers.append(counter.result(together))
        progress(1)
    return TraceStatistics(trace.header.name, trace.header.step, vocabulary, tuple(layers))


def _vocabulary(texts: list[Tokens], domains: int, limits: Limits) -> Vocabulary:
    ids_N = np.concatenate([text.ids_N for text in texts])
    domains_N = np.concatenate([text.domains_N for text in texts])
    ids_V, counts_V = np.unique(ids_N, return_counts=True)
    known = ids_V != UNKNOWN_TOKEN
    ids_V, counts_V = ids_V[known], counts_V[known]
    types = len(ids_V)
    order_V = np.argsort(-counts_V, kind="stable")[: limits.expert_tokens]
    order_V = order_V[counts_V[order_V] >= limits.min_count]
    return Vocabulary(
        ids_V=ids_V[order_V].astype(np.int32),
        counts_V=counts_V[order_V].astype(np.int64),
        tokens=len(ids_N),
        types=types,
        domain_tokens_D=np.bincount(domains_N, minlength=domains),
    )


class _LayerCounter:
    """Counts the experts and neurons of one layer, shard by shard."""

    def __init__(
        self, shape: LayerShape, vocabulary: Vocabulary, limits: Limits, *, ordered: bool
    ) -> None:
        self.shape, self.vocabulary, self.ordered = shape, vocabulary, ordered
        self.limits = limits
        experts, neurons = shape.experts, shape.neurons
        domains, frequent = len(vocabulary.domain_tokens_D), len(vocabulary.ids_V)
        self.tokens_E = np.zeros(experts, np.int64)
        self.weight_E = np.zeros(experts)
        self.weighted = True
        self.together_EE = np.zeros((experts, experts), np.int64)
        self.domain_DE = np.zeros((domains, experts), np.int64)
        self.token_VE = np.zeros((frequent, experts), np.int64)
        self.shared_K = np.zeros(shape.top_k, np.int64)
        self.compared = 0
        self.adjacent_shared = self.adjacent_pairs = 0
        room = limits.table_bytes // max(1, experts * neurons * 8)
        self.told_apart = min(limits.neuron_tokens, frequent, room)
        self.kept_EF = np.zeros((experts, neurons), np.int64)
        self.domain_DEF = np.zeros((domains, experts, neurons), np.int64)
        self.token_VEF = np.zeros((self.told_apart, experts, neurons), np.int64)
        self.saturation: KeptOverlap | None = None
        self.adjacent = KeptOverlap.nothing(experts)
        self.unions = ChunkUnions.nothing()
        # Rank of a token among the frequent ones, by a search in the ascending ids.
        self._by_id = np.argsort(vocabulary.ids_V)
        self._sorted = vocabulary.ids_V[self._by_id]

    def _rank(self, ids_N: Int32Array) -> npt.NDArray[np.int64]:
        """Returns each token's place in ``vocabulary.ids_V``; -1 for one that is not there."""
        if not len(self._sorted):
            return np.full(len(ids_N), -1, np.int64)
        place_N = np.searchsorted(self._sorted, ids_N).clip(max=len(self._sorted) - 1)
        return np.where(self._sorted[place_N] == ids_N, self._by_id[place_N], -1)

    def add(self, text: Tokens, routing: Routing, final: Routing | None) -> None:
        """Counts one shard; ``final`` is the same shard of the final checkpoint."""
        experts_NK, experts = routing.experts_NK, self.shape.experts
        rank_N = self._rank(text.ids_N)
        self.tokens_E += expert_counts(experts_NK, experts)
        if routing.weights_NK is None:
            self.weighted = False
        else:
            flat = routing.weights_NK.reshape(-1)
            self.weight_E += np.bincount(experts_NK.reshape(-1), flat, minlength=experts)
        self.together_EE += coactivation_counts(experts_NK, experts)
        domains, frequent = len(self.domain_DE), len(self.token_VE)
        self.domain_DE += grouped_expert_counts(text.domains_N, experts_NK, domains, experts)
        self.token_VE += grouped_expert_counts(rank_N, experts_NK, frequent, experts)
        if final is not None:
            self.shared_K += shared_experts(experts_NK, final.experts_NK)
            self.compared += len(experts_NK)
        follows_N = text.windows_N[:-1] == text.windows_N[1:]
        here_NK, next_NK = experts_NK[:-1][follows_N], experts_NK[1:][follows_N]
        self.adjacent_shared += int(shared_experts(here_NK, next_NK)[-1])
        self.adjacent_pairs += len(here_NK)
        if routing.kept_NKB is not None:
            self._add_neurons(text, routing, final, rank_N, follows_N)

    def _add_neurons(
        self,
        text: Tokens,
        routing: Routing,
        final: Routing | None,
        rank_N: npt.NDArray[np.int64],
        follows_N: npt.NDArray[np.bool_],
    ) -> None:
        experts_NK, kept_NKB = routing.experts_NK, routing.kept_NKB
        assert kept_NKB is not None
        experts, neurons = self.shape.experts, self.shape.neurons
        kept_RB = kept_NKB.reshape(-1, kept_NKB.shape[-1])

        def by_group(groups_N: npt.NDArray[np.integer], groups: int) -> Counts:
            """Counts kept neurons as ``[G, E, F]``; a group below 0 is left out."""
            group_NK = np.where(
                groups_N[:, None] < 0, -1, groups_N[:, None].astype(np.int64) * experts + experts_NK
            )
            counts = kept_counts(group_NK.reshape(-1), kept_RB, groups * experts, neurons)
            return counts.reshape(groups, experts, neurons)

        domain_DEF = by_group(text.domains_N, len(self.domain_DEF))
        self.domain_DEF += domain_DEF
        self.kept_EF += domain_DEF.sum(axis=0)
        if self.told_apart:
            told_N = np.where(rank_N < self.told_apart, rank_N, -1)
            self.token_VEF += by_group(told_N, self.told_apart)
        if final is not None:
            assert final.kept_NKB is not None
            overlap = kept_overlap(experts_NK, kept_NKB, final.experts_NK, final.kept_NKB, experts)
            self.saturation = overlap if self.saturation is None else self.saturation + overlap
        self.unions += chunk_unions(text.windows_N, experts_NK, kept_NKB, experts)
        self.adjacent += kept_overlap(
            experts_NK[:-1][follows_N],
            kept_NKB[:-1][follows_N],
            experts_NK[1:][follows_N],
            kept_NKB[1:][follows_N],
            experts,
        )

    def _excess(self, kept_GEF: Counts, tokens_GE: Counts) -> Excess:
        return largest_excess(
            kept_GEF, tokens_GE, self.kept_EF, self.tokens_E, self.limits.min_count
        )

    def result(self, together: tuple[Together, ...]) -> LayerStatistics:
        """Returns what was counted."""
        top_k = self.shape.top_k
        saturation_K = None
        if self.compared:
            saturation_K = self.shared_K / (self.compared * np.arange(1, top_k + 1))
            if not self.ordered:
                saturation_K[:-1] = np.nan
        experts = ExpertStatistics(
            tokens_E=self.tokens_E,
            weight_E=divide(self.weight_E, self.tokens_E if self.weighted else 0),
            together_EE=self.together_EE,
            domain_DE=self.domain_DE,
            token_VE=self.token_VE,
            saturation_K=saturation_K,
            adjacent=float(divide(self.adjacent_shared, self.adjacent_pairs * top_k)),
        )
        neurons = None
        if self.shape.neurons:
            neurons = NeuronStatistics(
                kept_EF=self.kept_EF,
                by_token=self._excess(self.token_VEF, self.token_VE[: self.told_apart]),
                by_domain=self._excess(self.domain_DEF, self.domain_DE),
                told_apart=self.told_apart,
                together=together,
                saturation=self.saturation,
                adjacent=self.adjacent,
                unions=self.unions,
            )
        return LayerStatistics(self.shape, experts, neurons)


def _together(
    trace: Trace, shape: LayerShape, kept_EF: Counts, limits: Limits
) -> tuple[Together, ...]:
    """Counts neurons kept together, in a second pass: only the first tells the most kept ones."""
    if not shape.neurons:
        return ()
    tokens_E = kept_EF.sum(axis=1)
    chosen_X = np.argsort(-tokens_E, kind="stable")[: limits.experts_together]
    chosen_X = np.sort(chosen_X[tokens_E[chosen_X] > 0])
    neurons_XM = np.argsort(-kept_EF[chosen_X], axis=1, kind="stable")
    neurons_XM = neurons_XM[:, : limits.neurons_together]
    counts = [np.zeros((neurons_XM.shape[1],) * 2, np.int64) for _ in chosen_X]
    for routing in trace.routings(shape.layer):
        assert routing.kept_NKB is not None
        for index, expert in enumerate(chosen_X):
            rows_RB = routing.kept_NKB[routing.experts_NK == expert]
            counts[index] += kept_together(rows_RB, neurons_XM[index])
    return tuple(
        Together(int(expert), neurons_M, counts_MM)
        for expert, neurons_M, counts_MM in zip(chosen_X, neurons_XM, counts, strict=True)
    )
