"""Counts the neurons that any of some adjacent tokens keeps: what a step of so many has to read.

Of one token it is what a token computes; of several it says what batched decoding, or checking
tokens that were guessed ahead, can still leave out. Training counts it of its own rows, and
``lab/routing`` of a trace's.

Shape suffixes: T rows (a token once for each of its experts), F neurons of one expert, W words of
eight of them, L lengths of chunks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mone_megatron.methods.grouped_rows import GroupedRows

# Tokens of a chunk: each length is twice the one before.
CHUNK_LENGTHS = (1, 2, 4, 8, 16, 32)
# A word of eight bytes that are one.
_ONES = 0x0101010101010101


@dataclass(frozen=True)
class TokenOrder:
    """Says where the tokens of rows stand in their sequences.

    Attributes:
        token_T: int64, the token of each row; token ``s * sequences + b`` is the s-th of sequence
            b, as megatron-core lays out ``[s, b, h]``.
        tokens: how many there are, of all sequences.
        sequences: how many stand side by side.
    """

    token_T: Tensor
    tokens: int
    sequences: int

    @property
    def chunks_L(self) -> list[int]:
        """Returns how many chunks of each length there are, of all sequences."""
        length = self.tokens // self.sequences
        return [length // chunk * self.sequences for chunk in CHUNK_LENGTHS]


class ChunkUnions:
    """Adds up the kept neurons of chunks, of all experts of one layer together.

    Attributes:
        kept_L: fp64, kept neurons, summed over chunks; None while nothing was counted.
        chunks_L: how many chunks there were: sequences are cut from their beginning, and what is
            left at their end is in none.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Counts anew."""
        self.kept_L: Tensor | None = None
        self.chunks_L = [0] * len(CHUNK_LENGTHS)
        self.neurons = 0

    def add(self, mask_TF: Tensor, expert_T: Tensor, order: TokenOrder, num_experts: int) -> None:
        """Counts one forward pass; the parameters are those of :func:`kept_of_chunks`."""
        self.neurons = num_experts * mask_TF.shape[-1]
        counts = zip(self.chunks_L, order.chunks_L, strict=True)
        self.chunks_L = [before + more for before, more in counts]
        kept_L = kept_of_chunks(mask_TF, expert_T, order, num_experts)
        self.kept_L = kept_L if self.kept_L is None else self.kept_L + kept_L


@torch.no_grad()
def kept_of_chunks(
    mask_TF: Tensor, expert_T: Tensor, order: TokenOrder, num_experts: int
) -> Tensor:
    """Returns the neurons that chunks keep, summed over chunks, for each length: fp64 ``[L]``.

    Args:
        mask_TF: bool, True at kept neurons.
        expert_T: int64, the expert of each row.
        order: where the rows' tokens stand.
        num_experts: experts of the layer, all of which are here.
    """
    length = order.tokens // order.sequences
    place_T, sequence_T = (
        torch.div(order.token_T, order.sequences, rounding_mode="floor"),
        order.token_T % order.sequences,
    )
    # A group is an expert and a sequence; within it are places, and then chunks. One group more is
    # nobody's. All shapes are known to the host, which need not wait for a GPU.
    groups = num_experts * order.sequences
    group_T = expert_T * order.sequences + sequence_T
    # Eight neurons a word, a byte each, so that there are fewer numbers to add.
    padded = torch.nn.functional.pad(mask_TF.view(torch.uint8), (0, -mask_TF.shape[-1] % 8))
    kept_TW = padded.contiguous().view(torch.int64)
    found = []
    chunks_before = length
    for chunk in CHUNK_LENGTHS:
        chunks = length // chunk
        if chunks == 0:
            found.append(torch.zeros((), dtype=torch.float64, device=mask_TF.device))
            continue
        if chunk > 1:
            place_T = torch.div(place_T, 2, rounding_mode="floor")
            nobodys = groups * chunks
            key_T = group_T * chunks + place_T
            if chunks_before > 2 * chunks:
                left_over_T = place_T >= chunks
                key_T = key_T.masked_fill(left_over_T, nobodys)
                kept_TW = kept_TW.masked_fill(left_over_T.unsqueeze(-1), 0)
            number_T = GroupedRows.of(key_T).number_T
            most = min(len(key_T), nobodys + 1)
            both = kept_TW.new_zeros(most, kept_TW.shape[-1])
            both.index_add_(0, number_T, kept_TW)
            # Of a chunk's two halves, or one: bytes are 0, 1 or 2.
            kept_TW = (both | both >> 1) & _ONES
            keys = key_T.new_full((most,), nobodys).scatter_(0, number_T, key_T)
            group_T = torch.div(keys, chunks, rounding_mode="floor")
            place_T = keys % chunks
        chunks_before = chunks
        found.append(torch.count_nonzero(kept_TW.flatten().view(torch.uint8)).double())
    return torch.stack(found)


def summarise_unions(
    counts: Mapping[int, ChunkUnions], *, rows: int, device: torch.device
) -> Tensor:
    """Returns the share of a layer's neurons that chunks keep. Collective; equal on every rank.

    Args:
        counts: this rank's, each at its row. Every rank holds all neurons of a layer and counts
            tokens of its own, or counts nothing.
        rows: how many layers there are, over all ranks.
        device: the device on which the counts are added up.

    Returns:
        ``[rows, L]`` fp64 on the CPU; NaN where no chunk was counted.
    """
    width = len(CHUNK_LENGTHS)
    sums = torch.zeros(rows, 2 * width, dtype=torch.float64, device=device)
    for row, one in counts.items():
        if one.kept_L is not None:
            sums[row, :width] = one.kept_L.to(device)
            sums[row, width:] = torch.tensor(
                [count * one.neurons for count in one.chunks_L], dtype=torch.float64, device=device
            )
    dist.all_reduce(sums)
    kept, possible = sums.cpu().split(width, dim=-1)
    return torch.where(possible > 0, kept / possible, torch.nan)
