"""Counts over the tokens of a trace with pure functions of arrays, without loops over tokens.

Shape suffixes: N tokens, K experts of a token, E experts of a layer, R rows (a token once for each
of its experts), F neurons of an expert, B bytes of their bits, G groups of rows, P pairs, M chosen
neurons.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from mone_megatron.lab.routing.bits import Bits, count, unpack
from mone_megatron.mone.chunk_unions import CHUNK_LENGTHS, TokenOrder, kept_of_chunks
from mone_megatron.report.stats import FloatArray

Counts = npt.NDArray[np.int64]
Indices = npt.NDArray[np.integer]
# Bits that are unpacked at once: 64 MiB as float32.
_UNPACKED = 1 << 24


def expert_counts(experts_NK: Indices, experts: int) -> Counts:
    """Returns how many tokens were routed to each expert, as ``[E]`` int64."""
    return np.bincount(experts_NK.reshape(-1), minlength=experts)


def coactivation_counts(experts_NK: Indices, experts: int) -> Counts:
    """Returns how many tokens were routed to both i and j, as ``[E, E]`` int64.

    On the diagonal it is how many were routed to i.
    """
    chosen_NE = np.zeros((len(experts_NK), experts), dtype=np.float32)
    np.put_along_axis(chosen_NE, experts_NK.astype(np.int64), 1, axis=1)
    # Exact in float32: a shard has fewer than 2^24 tokens.
    return (chosen_NE.T @ chosen_NE).astype(np.int64)


def grouped_expert_counts(
    groups_N: Indices, experts_NK: Indices, groups: int, experts: int
) -> Counts:
    """Returns how many tokens of each group were routed to each expert: ``[G, E]`` int64.

    A group below 0 is left out.
    """
    flat_NK = groups_N[:, None].astype(np.int64) * experts + experts_NK
    flat = flat_NK[groups_N >= 0].reshape(-1)
    return np.bincount(flat, minlength=groups * experts).reshape(groups, experts)


def shared_experts(first_NK: Indices, second_NK: Indices) -> Counts:
    """Returns, for k from 1 to K, how many top-k experts two choices share: ``[K]`` int64.

    Each is summed over tokens. The experts of a token stand in the order of their weights; K is the
    smaller number of both choices.
    """
    smaller = min(first_NK.shape[1], second_NK.shape[1])
    same_NKK = first_NK[:, :smaller, None] == second_NK[:, None, :smaller]
    # Before the sums over prefixes, so that these are over one table instead of one a token.
    same_KK = same_NKK.sum(axis=0, dtype=np.int64)
    return np.diagonal(same_KK.cumsum(axis=0).cumsum(axis=1)).copy()


@dataclass(frozen=True)
class KeptOverlap:
    """Holds how many kept neurons two choices have in common, by the expert that both chose.

    Attributes:
        pairs_E: int64, how many pairs of rows had this expert in common.
        shared_E: int64, kept neurons in common, summed over them.
        possible_E: int64, kept neurons of the second, summed over them.
    """

    pairs_E: Counts
    shared_E: Counts
    possible_E: Counts

    def __add__(self, other: KeptOverlap) -> KeptOverlap:
        return KeptOverlap(
            self.pairs_E + other.pairs_E,
            self.shared_E + other.shared_E,
            self.possible_E + other.possible_E,
        )

    @classmethod
    def nothing(cls, experts: int) -> KeptOverlap:
        """Returns the overlap of no pairs of rows: zeros for ``experts`` experts."""
        return cls(*(np.zeros(experts, dtype=np.int64) for _ in range(3)))


def kept_overlap(
    first_NK: Indices, first_kept_NKB: Bits, second_NK: Indices, second_kept_NKB: Bits, experts: int
) -> KeptOverlap:
    """Counts the kept neurons that two choices share, in experts that both route a token to."""
    token_P, first_P, second_P = np.nonzero(first_NK[:, :, None] == second_NK[:, None, :])
    expert_P = first_NK[token_P, first_P]
    theirs_PB = second_kept_NKB[token_P, second_P]
    shared_P = count(first_kept_NKB[token_P, first_P] & theirs_PB)
    # float64 weights are exact here: counts stay far below 2^53.
    return KeptOverlap(
        np.bincount(expert_P, minlength=experts),
        np.bincount(expert_P, shared_P, minlength=experts).astype(np.int64),
        np.bincount(expert_P, count(theirs_PB), minlength=experts).astype(np.int64),
    )


# Bytes of the rows of kept neurons, a byte each, that are looked at at once.
_TABLE_BYTES = 1 << 26


@dataclass(frozen=True)
class ChunkUnions:
    """Counts the neurons that any token of a chunk of adjacent tokens keeps, by its length.

    Attributes:
        kept_L: int64, kept neurons of a layer, summed over chunks, for each of
            :data:`CHUNK_LENGTHS`.
        chunks_L: int64, how many chunks there were: windows are cut from their beginning, and what
            is left at their end is in none.
    """

    kept_L: Counts
    chunks_L: Counts

    def __add__(self, other: ChunkUnions) -> ChunkUnions:
        return ChunkUnions(self.kept_L + other.kept_L, self.chunks_L + other.chunks_L)

    @classmethod
    def nothing(cls) -> ChunkUnions:
        """Returns the counts of no tokens."""
        return cls(*(np.zeros(len(CHUNK_LENGTHS), dtype=np.int64) for _ in range(2)))


def chunk_unions(
    windows_N: Indices, experts_NK: Indices, kept_NKB: Bits, experts: int
) -> ChunkUnions:
    """Counts the neurons that chunks of adjacent tokens keep between them, as training does.

    Args:
        windows_N: the window of each token; those of a window lie together.
        experts_NK: the experts of each token, all different.
        kept_NKB: the bits of the neurons that it keeps in them.
        experts: E, of the layer.
    """
    found = ChunkUnions.nothing()
    longest, chosen = CHUNK_LENGTHS[-1], experts_NK.shape[-1]
    # The bits of the last byte that stand for no neuron are 0, and count nothing.
    neurons = 8 * kept_NKB.shape[-1]
    piece = max(1, _TABLE_BYTES // (chosen * neurons * longest)) * longest
    begins = np.flatnonzero(np.diff(windows_N, prepend=windows_N[:1] - 1))
    ends = np.append(begins[1:], len(windows_N))[: len(begins)]
    for begin, end in zip(begins, ends, strict=True):
        # Pieces begin where chunks of every length do.
        for start in range(begin, end, piece):
            tokens = min(piece, end - start)
            mask_NKF = unpack(kept_NKB[start : start + tokens], neurons)
            expert_NK = experts_NK[start : start + tokens].astype(np.int64)
            token_T = torch.arange(tokens).repeat_interleave(chosen)
            order = TokenOrder(token_T, tokens, sequences=1)
            kept_L = kept_of_chunks(
                torch.from_numpy(mask_NKF).flatten(0, 1).bool(),
                torch.from_numpy(expert_NK).flatten(),
                order,
                experts,
            )
            found += ChunkUnions(
                kept_L.numpy().astype(np.int64), np.array(order.chunks_L, dtype=np.int64)
            )
    return found


def kept_counts(groups_R: Indices, kept_RB: Bits, groups: int, neurons: int) -> Counts:
    """Counts the rows of each group that keep each neuron: ``[G, F]`` int64.

    A group below 0 is left out.
    """
    taken_R = groups_R >= 0
    groups_R, kept_RB = groups_R[taken_R].astype(np.int64), kept_RB[taken_R]
    # In float32, whose sums are the fastest, and exact: a shard has fewer than 2^24 rows.
    counts_GF = torch.zeros(groups, neurons)
    rows = max(1, _UNPACKED // neurons)
    for start in range(0, len(groups_R), rows):
        kept_RF = torch.from_numpy(unpack(kept_RB[start : start + rows], neurons)).float()
        counts_GF.index_add_(0, torch.from_numpy(groups_R[start : start + rows]), kept_RF)
    return counts_GF.numpy().astype(np.int64)


def kept_together(kept_RB: Bits, neurons_M: Indices) -> Counts:
    """Counts the rows that keep both of two chosen neurons: ``[M, M]`` int64.

    On the diagonal it is the rows that keep the neuron.
    """
    bits_RM = kept_RB[:, neurons_M // 8] >> (neurons_M % 8).astype(np.uint8) & 1
    chosen_RM = bits_RM.astype(np.float32)
    return (chosen_RM.T @ chosen_RM).astype(np.int64)


def conditional(counts_EE: Counts) -> FloatArray:
    """Returns the co-activations ``count(i, j) / count(i)``; ``count(i)`` is on the diagonal.

    They are float64, and NaN in the rows of an i that never occurs.
    """
    own_E1 = np.diagonal(counts_EE)[:, None].astype(np.float64)
    return np.divide(counts_EE, own_E1, out=np.full(counts_EE.shape, np.nan), where=own_E1 > 0)


def divide(above: npt.ArrayLike, below: npt.ArrayLike) -> FloatArray:
    """Returns the quotient in float64, broadcast; it is NaN where the divisor is 0."""
    top, bottom = np.broadcast_arrays(np.asarray(above, np.float64), np.asarray(below, np.float64))
    return np.divide(top, bottom, out=np.full(top.shape, np.nan), where=bottom != 0)


def entropy_share(counts: Counts) -> FloatArray:
    """Returns the entropy of each row of counts ``[..., F]`` as a share of an even row's.

    It is 1 where counts are even and NaN for empty rows.
    """
    shares = divide(counts, counts.sum(axis=-1, keepdims=True))
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    return -(shares * logs).sum(axis=-1) / max(np.log(counts.shape[-1]), 1e-12)
