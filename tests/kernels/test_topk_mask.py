from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mone_megatron.kernels import ops, reference
from mone_megatron.kernels.reference import TopK
from mone_megatron.methods.scores import SCORES as REGISTERED

# Those that a kernel can be asked for: they read nothing but gate and up.
SCORES = [score.name for score in REGISTERED if "down_norm" not in score.reads]
TopKMask = Callable[[Tensor, int], Tensor]


def sorted_mask(scores_TF: Tensor, k: int) -> Tensor:
    """The definition: sort by score, largest first, then by index; keep the first k."""
    mask = torch.zeros_like(scores_TF, dtype=torch.bool)
    for row, values in enumerate(scores_TF.tolist()):
        order = sorted(range(len(values)), key=lambda j: (-values[j], j))
        mask[row, order[:k]] = True
    return mask


@pytest.fixture(params=[reference.topk_mask, ops.topk_mask], ids=["reference", "ops"])
def topk_mask(request: pytest.FixtureRequest) -> TopKMask:
    return request.param


def python_score(gate: float, up: float, score: str) -> float:
    activation = gate / (1 + math.exp(-gate))
    return {
        "abs_activation": abs(activation),
        "abs_gate": abs(gate),
        "signed_gate": gate,
        "abs_product": abs(activation * up),
    }[score]


@pytest.mark.parametrize("score", SCORES)
def test_scores_match_their_formulas(score: str) -> None:
    gate, up = torch.randn(2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = [
        [python_score(g, u, score) for g, u in zip(*pair, strict=True)]
        for pair in zip(gate.tolist(), up.tolist(), strict=True)
    ]
    torch.testing.assert_close(
        reference.neuron_scores(gate, up, score), torch.tensor(expected, dtype=torch.float64)
    )


def test_an_unknown_score_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"mone\.score: 'loudest' is unknown; use one of abs_activation, abs_gate,"
    ):
        reference.neuron_scores(torch.ones(1, 2), torch.ones(1, 2), "loudest")  # type: ignore[arg-type]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("k", [1, 16, 32, 64])
def test_exactly_k_in_bf16_where_scores_tie(topk_mask: TopKMask, score: str, k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    gate, up = torch.randn(2, 400, 64, generator=generator).bfloat16()
    scores = reference.neuron_scores(gate, up, score)
    assert scores.dtype is torch.bfloat16
    kth = scores.float().sort(dim=-1, descending=True).values[:, k - 1 : k]
    if k < 64:  # the case under test: ties at the threshold that not all can stay
        assert ((scores.float() >= kth).sum(-1) > k).any()
    mask = topk_mask(scores, k)
    assert mask.dtype is torch.bool
    assert mask.sum(-1).eq(k).all()
    assert torch.equal(mask, sorted_mask(scores, k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, -1.5, 3.0, math.inf, -math.inf])
def test_constant_rows_keep_the_first_k(
    topk_mask: TopKMask, value: float, dtype: torch.dtype
) -> None:
    mask = topk_mask(torch.full((3, 8), value, dtype=dtype), 3)
    assert mask.tolist() == [[True] * 3 + [False] * 5] * 3


def test_zeros_of_both_signs_tie(topk_mask: TopKMask) -> None:
    scores = torch.tensor([[-0.0, 0.0, -0.0, 0.0, -1.0], [0.0, -0.0, 1.0, 0.0, -0.0]])
    assert topk_mask(scores, 2).tolist() == [
        [True, True, False, False, False],
        [True, False, True, False, False],
    ]


def test_infinities_are_ordinary_scores(topk_mask: TopKMask) -> None:
    inf = math.inf
    scores = torch.tensor([[1.0, -inf, inf, inf, 2.0], [-inf, -inf, 0.0, -inf, -inf]])
    assert torch.equal(topk_mask(scores, 3), sorted_mask(scores, 3))
    assert topk_mask(scores, 3)[1].tolist() == [True, True, True, False, False]


@pytest.mark.parametrize("nans", [1, 2, 3, 5])
def test_a_row_with_nan_keeps_nothing_and_spreads_it(topk_mask: TopKMask, nans: int) -> None:
    # The second row is as treacherous as can be: ties make up for the NaNs in the count.
    scores = torch.tensor([[1.0, 5.0, 3.0, 2.0, 4.0], [2.0, 2.0, 2.0, 2.0, 2.0], [3.0, 1, 2, 4, 5]])
    scores[:2, 5 - nans :] = math.nan
    mask = topk_mask(scores, 3)
    assert mask[:2].sum() == 0
    assert mask[2].tolist() == [True, False, False, True, True]
    hidden = ops.selected_glu(scores, torch.ones_like(scores), mask, torch.ones(3))
    assert hidden[0].isnan().any()
    assert hidden[1].isnan().any()
    assert hidden[2].isfinite().all()


def test_no_rows(topk_mask: TopKMask) -> None:
    mask = topk_mask(torch.zeros(0, 6), 2)
    assert mask.shape == (0, 6)
    assert mask.dtype is torch.bool


@pytest.mark.parametrize("k", [1, 5])
def test_the_mask_ignores_where_gradients_are_wanted(topk_mask: TopKMask, k: int) -> None:
    scores = torch.randn(3, 5, generator=torch.Generator().manual_seed(1), requires_grad=True)
    mask = topk_mask(scores, k)
    assert not mask.requires_grad
    assert torch.equal(mask, sorted_mask(scores, k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ops_equal_the_reference_bit_for_bit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    awkward = torch.tensor([0.0, -0.0, 1.0, 1.0, -1.0, math.inf, -math.inf, math.nan])
    for rows, neurons in product((1, 3, 50), (1, 2, 12, 20, 64)):
        random = torch.randn(rows, neurons, generator=generator)
        coarse = (random * 2).round() / 2
        index = torch.randint(0, len(awkward), (rows, neurons), generator=generator)
        for scores in (random, coarse, awkward[index], random.new_zeros(rows, neurons)):
            scores = scores.to(dtype)
            # Rows that are not contiguous, too: gate and up are the halves of one matrix.
            wide = torch.cat([scores, scores], dim=-1)
            for k in {1, neurons // 4 or 1, neurons // 2 or 1, neurons}:
                expected = reference.topk_mask(scores, k)
                assert torch.equal(ops.topk_mask(scores, k), expected), (scores, k)
                assert torch.equal(ops.topk_mask(wide.chunk(2, dim=-1)[1], k), expected)


def test_ops_leave_the_scores_alone() -> None:
    scores = torch.randn(9, 16, generator=torch.Generator().manual_seed(4)).bfloat16().float()
    before = scores.clone()
    ops.topk_mask(scores, 4)
    assert torch.equal(scores, before)


# Few distinct values, so that ties are common.
TIED_ROWS = st.integers(1, 24).flatmap(
    lambda width: st.lists(
        st.lists(st.sampled_from([-2.0, -0.0, 0.0, 0.5, 1.0, 7.0]), min_size=width, max_size=width),
        min_size=1,
        max_size=5,
    )
)


@given(rows=TIED_ROWS, data=st.data())
def test_properties_with_ties(rows: list[list[float]], data: st.DataObject) -> None:
    scores = torch.tensor(rows)
    k = data.draw(st.integers(1, scores.shape[1]))
    expected = sorted_mask(scores, k)
    for topk_mask in (reference.topk_mask, ops.topk_mask):
        mask = topk_mask(scores, k)
        assert mask.sum(-1).eq(k).all()
        lowest_kept = scores.where(mask, torch.inf).amin(-1)
        highest_dropped = scores.where(~mask, -torch.inf).amax(-1)
        assert (lowest_kept >= highest_dropped).all()
        assert torch.equal(mask, expected)
        if k < scores.shape[1]:  # monotone: a larger k keeps all that a smaller one does
            assert (topk_mask(scores, k + 1) | ~mask).all()


@given(
    row=st.lists(
        st.floats(-100, 100, width=32, allow_subnormal=False),
        min_size=1,
        max_size=24,
        unique_by=lambda value: value + 0.0,  # -0.0 and 0.0 tie
    ),
    data=st.data(),
)
def test_permuting_distinct_scores_permutes_the_mask(row: list[float], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(row))))
    k = data.draw(st.integers(1, len(row)))
    scores = torch.tensor([row])
    for topk_mask in (reference.topk_mask, ops.topk_mask):
        assert torch.equal(topk_mask(scores[:, order], k), topk_mask(scores, k)[:, order])


def test_agrees_with_numpy_stable_sort(topk_mask: TopKMask) -> None:
    rng = np.random.default_rng(5)
    scores = rng.integers(0, 9, (200, 40)).astype(np.float32)
    expected = np.zeros(scores.shape, dtype=bool)
    first = np.argsort(-scores, axis=-1, kind="stable")[:, :10]
    np.put_along_axis(expected, first, True, axis=-1)
    assert np.array_equal(topk_mask(torch.from_numpy(scores), 10).numpy(), expected)


@pytest.mark.parametrize("kept", [1, 5, 64, 127])
@pytest.mark.parametrize("signed", [False, True])
def test_zeros_of_both_signs_infinities_and_tiny_scores(kept: int, signed: bool) -> None:
    """Scores without signs are ordered as integers, whose zeros are two."""
    generator = torch.Generator().manual_seed(kept)
    values = torch.tensor([0.0, -0.0, math.inf, 1e-45, 1e-40, 1.0, 1.0 + 2**-23, 3e38])
    scores = values[torch.randint(len(values), (16, 128), generator=generator)]
    scores[0] = -0.0
    scores[1, :100] = -0.0
    if signed:
        scores[8:] *= -1
    assert torch.equal(ops.topk_mask(scores, kept), sorted_mask(scores, kept))


@pytest.mark.parametrize("kept", [1, 3, 8])
def test_no_number_among_scores_without_signs(kept: int) -> None:
    scores = torch.rand(6, 8, generator=torch.Generator().manual_seed(kept))
    scores[1, 4], scores[3, :3], scores[4] = math.nan, math.nan, math.nan
    scores[5] = 0.5
    scores[5, 6] = -math.nan
    expected = reference.topk_mask(scores, kept)
    assert torch.equal(ops.topk_mask(scores, kept), expected)
    # In one pass with the gated unit, where a NaN could hide among ties.
    gate = torch.tensor([[2.0, 2.0, math.nan, 2.0], [1.0, 2.0, 3.0, 4.0], [-math.nan, 0, 0, 0]])
    for k in (1, 2, 3):
        mask = reference.topk_mask(reference.neuron_scores(gate, gate, "abs_activation"), k)
        hidden = ops.selected_glu(gate, torch.ones(3, 4), TopK(k, "abs_activation"), None)
        wanted = reference.selected_glu(gate, torch.ones(3, 4), mask, None)
        torch.testing.assert_close(hidden, wanted, equal_nan=True, rtol=0, atol=0)
