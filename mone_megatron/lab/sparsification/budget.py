"""Finds shares for each layer that keep the loss within a budget.

Each layer's sensitivity is measured: how much the loss rises when that layer alone is pruned, for
some shares. The rises of several layers are taken to add up. Neurons are then pruned where they
cost least: the lower convex hull of each layer's curve is cut into its straight pieces, and the
pieces of all layers are taken from the flattest on, which is the best there is wherever a piece
ends. Since rises do not quite add up, the loss itself is measured along that path and the longest
part of it that keeps the budget is found by bisection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Allotment:
    """Holds the shares of all layers.

    Attributes:
        shares: pruned of each layer.
        pruned: share of all neurons of a token.
        predicted: rise of the loss, if the layers' rises add up.
    """

    shares: tuple[float, ...]
    pruned: float
    predicted: float


@dataclass(frozen=True)
class Probe:
    """Holds an allotment and its measured rise of the loss."""

    allotment: Allotment
    measured: float


def path(
    sensitivity: Sequence[Sequence[float]], shares: Sequence[float], weights: Sequence[float]
) -> list[Allotment]:
    """Returns allotments, from nothing pruned to as much as was measured, as a path.

    Each contains the one before.

    Args:
        sensitivity: ``[layers][shares]``, the rise of the loss with one layer pruned. A fall, or a
            rise below that of a smaller share, is noise and counts as none.
        shares: ascending, above 0.
        weights: neurons of a token in each layer.

    Raises:
        ValueError: no shares, or other numbers of them than of rises.
    """
    if not shares or any(len(rises) != len(shares) for rises in sensitivity):
        raise ValueError("the sensitivity of every layer is needed at every share, at least one")
    pieces = []
    for layer, (rises, weight) in enumerate(zip(sensitivity, weights, strict=True)):
        for share, rise, slope in _hull(shares, rises):
            # Flattest first; a layer's own pieces stay in order, since a hull's slopes ascend.
            pieces.append((slope / weight, layer, share, rise))
    pieces.sort()
    total = sum(weights)
    current = [0.0] * len(weights)
    cost = [0.0] * len(weights)
    allotments = [Allotment(tuple(current), 0.0, 0.0)]
    for _, layer, share, rise in pieces:
        current[layer], cost[layer] = share, rise
        pruned = sum(part * weight for part, weight in zip(current, weights, strict=True)) / total
        allotments.append(Allotment(tuple(current), pruned, sum(cost)))
    return allotments


def _hull(shares: Sequence[float], rises: Sequence[float]) -> list[tuple[float, float, float]]:
    """Returns the corners (share, rise, slope up to it) of the lower convex hull from (0, 0)."""
    points = [(0.0, 0.0)]
    highest = 0.0
    for share, rise in zip(shares, rises, strict=True):
        highest = max(highest, rise)
        points.append((share, highest))
    hull: list[tuple[float, float]] = []
    for point in points:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return [(*corner, _slope(before, corner)) for before, corner in zip(hull, hull[1:])]  # noqa: B905, RUF007


def _slope(one: tuple[float, float], other: tuple[float, float]) -> float:
    return (other[1] - one[1]) / (other[0] - one[0])


def search(
    allotments: Sequence[Allotment],
    budget: float,
    measure: Callable[[Allotment], float],
    *,
    probes: int = 10,
) -> tuple[Probe, list[Probe]]:
    """Finds the allotment furthest along the path whose measured rise keeps the budget.

    Args:
        allotments: from :func:`path`.
        budget: the largest rise of the loss.
        measure: the rise of the loss with an allotment.
        probes: how many are measured at most; 10 finds the last of 1000.

    Returns:
        The best probe (pruning nothing costs nothing), and all in the order they were made.
    """
    best = Probe(allotments[0], 0.0)
    made: list[Probe] = []
    low, high = 0, len(allotments)
    # Where the prediction ends, to begin with.
    next_ = max(position for position, entry in enumerate(allotments) if entry.predicted <= budget)
    while high - low > 1 and len(made) < probes:
        position = next_ if low < next_ < high else (low + high) // 2
        probe = Probe(allotments[position], measure(allotments[position]))
        made.append(probe)
        if probe.measured <= budget:
            low, best = position, probe
        else:
            high = position
        next_ = (low + high) // 2
    return best, made
