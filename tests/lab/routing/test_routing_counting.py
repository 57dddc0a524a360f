"""Counts against cases computed by hand and against loops over tokens."""

from __future__ import annotations

import numpy as np
import numpy.testing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mone_megatron.kernels.packed import pack_bits
from mone_megatron.lab.routing import counting
from mone_megatron.lab.routing.bits import count, packed_bytes, unpack
from mone_megatron.lab.routing.counting import (
    CHUNK_LENGTHS,
    chunk_unions,
    coactivation_counts,
    conditional,
    entropy_share,
    expert_counts,
    grouped_expert_counts,
    kept_counts,
    kept_overlap,
    kept_together,
    shared_experts,
)

# Four tokens, two of three experts each.
EXPERTS = np.array([[0, 1], [0, 2], [1, 0], [2, 0]])


def bits(*rows: str) -> np.typing.NDArray[np.uint8]:
    """Rows of 0 and 1, the first neuron first."""
    mask = torch.tensor([[character == "1" for character in row] for row in rows])
    return pack_bits(mask).numpy()


def test_expert_counts_by_hand() -> None:
    npt.assert_array_equal(expert_counts(EXPERTS, 4), [4, 2, 2, 0])
    together = coactivation_counts(EXPERTS, 4)
    npt.assert_array_equal(together, [[4, 2, 2, 0], [2, 2, 0, 0], [2, 0, 2, 0], [0, 0, 0, 0]])
    shares = conditional(together)
    npt.assert_allclose(shares[0], [1, 0.5, 0.5, 0])
    npt.assert_allclose(shares[1], [1, 1, 0, 0])
    assert np.isnan(shares[3]).all()


def test_groups_by_hand() -> None:
    counts = grouped_expert_counts(np.array([1, -1, 0, 1]), EXPERTS, 2, 3)
    npt.assert_array_equal(counts, [[1, 1, 0], [2, 1, 1]])


def test_saturation_by_hand() -> None:
    final = np.array([[0, 1], [2, 0], [0, 1], [1, 2]])
    # Top 1: equal in the first only. Top 2: 2, 2, 2 and 1 of 2 in common.
    npt.assert_array_equal(shared_experts(EXPERTS, final), [1, 7])


def test_kept_neurons_by_hand() -> None:
    kept = bits("110000000", "011000000", "000000011")
    npt.assert_array_equal(count(kept), [2, 2, 2])
    counts = kept_counts(np.array([1, 1, -1]), kept, 2, 9)
    npt.assert_array_equal(counts[0], np.zeros(9))
    npt.assert_array_equal(counts[1], [1, 2, 1, 0, 0, 0, 0, 0, 0])
    npt.assert_array_equal(
        kept_together(kept, np.array([1, 8, 0])), [[2, 0, 1], [0, 1, 0], [1, 0, 1]]
    )


def test_kept_overlap_by_hand() -> None:
    # The first token has expert 1 in common, the second both of its experts, in another order.
    first, second = np.array([[0, 1], [2, 0]]), np.array([[1, 2], [0, 2]])
    kept_first = bits("1100", "0110", "1100", "0011").reshape(2, 2, 1)
    kept_second = bits("0101", "1100", "0110", "1100").reshape(2, 2, 1)
    overlap = kept_overlap(first, kept_first, second, kept_second, 4)
    npt.assert_array_equal(overlap.pairs_E, [1, 1, 1, 0])
    npt.assert_array_equal(overlap.shared_E, [1, 1, 2, 0])
    npt.assert_array_equal(overlap.possible_E, [2, 2, 2, 0])
    twice = overlap + overlap
    npt.assert_array_equal(twice.shared_E, [2, 2, 4, 0])


def test_entropy_by_hand() -> None:
    npt.assert_allclose(entropy_share(np.array([[3, 3, 3, 3], [5, 0, 0, 0]])), [1, 0], atol=1e-12)
    npt.assert_allclose(entropy_share(np.array([1, 1, 0, 0])), 0.5)
    assert np.isnan(entropy_share(np.array([0, 0])))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), experts=st.integers(1, 9), neurons=st.integers(1, 21))
def test_counts_equal_loops_over_tokens(seed: int, experts: int, neurons: int) -> None:
    rng = np.random.default_rng(seed)
    top_k = int(rng.integers(1, experts + 1))
    tokens = 12
    first, second = (
        np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)]) for _ in range(2)
    )
    mask = rng.random((2, tokens, top_k, neurons)) < 0.4
    kept = pack_bits(torch.from_numpy(mask)).numpy()
    assert kept.shape[-1] == packed_bytes(neurons)
    npt.assert_array_equal(unpack(kept, neurons), mask)
    npt.assert_array_equal(count(kept), mask.sum(axis=-1))

    together = np.zeros((experts, experts))
    for row in first:
        for i in row:
            for j in row:
                together[i, j] += 1
    npt.assert_array_equal(coactivation_counts(first, experts), together)

    for k in range(1, top_k + 1):
        wanted = sum(len(set(a[:k]) & set(b[:k])) for a, b in zip(first, second, strict=True))
        assert shared_experts(first, second)[k - 1] == wanted

    overlap = kept_overlap(first, kept[0], second, kept[1], experts)
    shared, pairs = np.zeros(experts), np.zeros(experts)
    for token in range(tokens):
        for i, e in enumerate(first[token]):
            for j, other in enumerate(second[token]):
                if e == other:
                    pairs[e] += 1
                    shared[e] += (mask[0, token, i] & mask[1, token, j]).sum()
    npt.assert_array_equal(overlap.pairs_E, pairs)
    npt.assert_array_equal(overlap.shared_E, shared)

    counted = kept_counts(first.reshape(-1), kept[0].reshape(tokens * top_k, -1), experts, neurons)
    wanted_counts = np.zeros((experts, neurons))
    for e, row in zip(first.reshape(-1), mask[0].reshape(-1, neurons), strict=True):
        wanted_counts[e] += row
    npt.assert_array_equal(counted, wanted_counts)


def test_many_rows_of_few_groups() -> None:
    kept = pack_bits(torch.ones(700, 3, dtype=torch.bool)).numpy()
    groups = np.repeat([2, 0, -1], [511, 179, 10])
    npt.assert_array_equal(kept_counts(groups, kept, 3, 3), [[179] * 3, [0] * 3, [511] * 3])
    assert kept_counts(groups[:0], kept[:0], 2, 3).tolist() == [[0] * 3] * 2


def test_many_rows_are_counted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    mask = torch.from_numpy(rng.random((50, 10)) < 0.5)
    groups = rng.integers(0, 3, 50)
    whole = kept_counts(groups, pack_bits(mask).numpy(), 3, 10)
    monkeypatch.setattr("mone_megatron.lab.routing.counting._UNPACKED", 70)
    npt.assert_array_equal(kept_counts(groups, pack_bits(mask).numpy(), 3, 10), whole)


@pytest.mark.parametrize("table_bytes", [1, 1 << 26])
def test_what_chunks_keep_is_what_a_loop_finds(
    monkeypatch: pytest.MonkeyPatch, table_bytes: int
) -> None:
    monkeypatch.setattr(counting, "_TABLE_BYTES", table_bytes)
    drawn = np.random.default_rng(3)
    experts, chosen, neurons = 5, 2, 19
    # Of lengths that no chunk divides, one shorter than the longest.
    windows = np.repeat([4, 2, 9], [101, 7, 64])
    tokens = len(windows)
    experts_NK = np.argsort(drawn.random((tokens, experts)), axis=1)[:, :chosen]
    kept_NKF = drawn.random((tokens, chosen, neurons)) < 0.2
    kept_NKB = pack_bits(torch.from_numpy(kept_NKF)).numpy()

    kept, chunks = [], []
    for length in CHUNK_LENGTHS:
        sizes = []
        for window in (4, 2, 9):
            mine = np.flatnonzero(windows == window)
            for start in range(0, len(mine) - length + 1, length):
                found = {
                    (int(experts_NK[token, slot]), int(neuron))
                    for token in mine[start : start + length]
                    for slot in range(chosen)
                    for neuron in np.flatnonzero(kept_NKF[token, slot])
                }
                sizes.append(len(found))
        kept.append(sum(sizes))
        chunks.append(len(sizes))
    unions = chunk_unions(windows, experts_NK, kept_NKB, experts)
    npt.assert_array_equal(unions.kept_L, kept)
    npt.assert_array_equal(unions.chunks_L, chunks)
    twice = unions + chunk_unions(windows, experts_NK, kept_NKB, experts)
    npt.assert_array_equal(twice.kept_L, 2 * np.array(kept))


def test_no_tokens_have_no_chunks() -> None:
    nothing = np.zeros(0, dtype=np.int32)
    unions = chunk_unions(nothing, np.zeros((0, 2), int), np.zeros((0, 2, 3), np.uint8), 4)
    assert not unions.kept_L.any()
    assert not unions.chunks_L.any()
