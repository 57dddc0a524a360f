"""Shares for layers within a loss budget: against brute force, and on a model with idle layers."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mone_megatron.lab.sparsification.budget import Allotment, path, search

SHARES = (0.25, 0.5, 0.9)
rises = st.lists(st.lists(st.floats(-0.1, 1), min_size=3, max_size=3), min_size=1, max_size=3)


def monotone(row: list[float]) -> list[float]:
    """As the allotment takes a row: noise that makes the loss fall is no gain."""
    highest, made = 0.0, []
    for rise in row:
        highest = max(highest, rise)
        made.append(highest)
    return made


@given(sensitivity=rises, weights=st.lists(st.integers(1, 9), min_size=3, max_size=3))
def test_every_stop_of_the_path_is_the_best_for_its_loss(
    sensitivity: list[list[float]], weights: list[int]
) -> None:
    weights = weights[: len(sensitivity)]
    allotments = path(sensitivity, SHARES, weights)
    costs = [dict(zip((0.0, *SHARES), (0.0, *monotone(row)), strict=True)) for row in sensitivity]
    every = [
        (sum(cost[share] for cost, share in zip(costs, shares, strict=True)), shares)
        for shares in product((0.0, *SHARES), repeat=len(sensitivity))
    ]

    def pruned(shares: tuple[float, ...]) -> float:
        return sum(s * w for s, w in zip(shares, weights, strict=True)) / sum(weights)

    assert allotments[0] == Allotment((0.0,) * len(weights), 0.0, 0.0)
    assert allotments[-1].shares == (SHARES[-1],) * len(weights)
    for before, after in pairwise(allotments):
        assert all(one <= other for one, other in zip(before.shares, after.shares, strict=True))
    for allotment in allotments:
        assert allotment.pruned == pytest.approx(pruned(allotment.shares))
        cost = sum(costs[at][share] for at, share in enumerate(allotment.shares))
        assert allotment.predicted == pytest.approx(cost)
        # Nothing that costs less prunes more.
        best = max(pruned(shares) for cost, shares in every if cost <= allotment.predicted - 1e-9) \
            if allotment.predicted > 1e-9 else 0.0  # fmt: skip
        assert allotment.pruned >= best - 1e-9


@given(
    sensitivity=rises, budget=st.floats(0.001, 3), factor=st.floats(0.2, 5)
)  # fmt: skip
def test_the_search_ends_at_the_last_stop_that_keeps_the_budget(
    sensitivity: list[list[float]], budget: float, factor: float
) -> None:
    allotments = path(sensitivity, SHARES, [1] * len(sensitivity))

    # Rises add up to more, or less, than was predicted.
    def measure(allotment: Allotment) -> float:
        return factor * allotment.predicted

    best, probes = search(allotments, budget, measure)
    assert best.measured <= budget
    assert best.allotment == [one for one in allotments if measure(one) <= budget][-1]
    assert len({probe.allotment for probe in probes}) == len(probes)


def test_few_probes_still_keep_the_budget() -> None:
    allotments = path([[0.1, 0.2, 0.9]] * 8, SHARES, [1] * 8)
    best, probes = search(allotments, 0.5, lambda allotment: 3 * allotment.predicted, probes=2)
    assert len(probes) == 2
    assert best.measured <= 0.5


def test_layers_that_cost_nothing_go_first() -> None:
    allotments = path([[0.2, 0.4, 0.9], [0.0, 0.0, 0.0], [0.1, 0.2, 0.5]], SHARES, [1, 1, 1])
    assert allotments[1].shares == (0.0, 0.9, 0.0)
    assert allotments[1].predicted == 0.0
    # Then where a neuron costs least.
    assert allotments[2].shares == (0.0, 0.9, 0.5)
    assert allotments[2].predicted == pytest.approx(0.2)


def test_a_sensitivity_at_no_share_is_refused() -> None:
    with pytest.raises(ValueError, match="at every share, at least one"):
        path([[]], (), [1])
    with pytest.raises(ValueError, match="at every share"):
        path([[0.1]], SHARES, [1])
