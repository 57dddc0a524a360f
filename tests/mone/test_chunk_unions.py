"""The share of a layer's neurons that chunks of adjacent tokens keep."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mone_megatron.mone.chunk_unions import CHUNK_LENGTHS, ChunkUnions, TokenOrder


@given(
    length=st.integers(1, 70),
    sequences=st.integers(1, 3),
    experts=st.integers(1, 4),
    neurons=st.integers(1, 9),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_unions_by_brute_force(
    length: int, sequences: int, experts: int, neurons: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Each token goes to some experts, by chance, and keeps some of their neurons.
    map_NE = torch.rand(length * sequences, experts, generator=generator) < 0.6
    expert_T, token_T = map_NE.T.nonzero().unbind(dim=-1)
    mask_TF = torch.rand(len(token_T), neurons, generator=generator) < 0.3
    counts = ChunkUnions()
    order = TokenOrder(token_T, length * sequences, sequences)
    counts.add(mask_TF, expert_T, order, experts)
    counts.add(mask_TF, expert_T, order, experts)
    assert counts.neurons == experts * neurons
    assert counts.kept_L is not None
    for place, chunk in enumerate(CHUNK_LENGTHS):
        kept = 0
        for sequence in range(sequences):
            for first in range(0, length - chunk + 1, chunk):
                read = {
                    (int(expert), neuron)
                    for expert, token, row in zip(expert_T, token_T, mask_TF, strict=True)
                    for neuron in row.nonzero().flatten().tolist()
                    if int(token) % sequences == sequence
                    and first <= int(token) // sequences < first + chunk
                }
                kept += len(read)
        assert counts.kept_L[place] == 2 * kept
        assert counts.chunks_L[place] == 2 * sequences * (length // chunk)
