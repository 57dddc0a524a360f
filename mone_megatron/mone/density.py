"""Steers a measured density to a target: a controller, and what counts for it.

Routers and losses that leave it open how much is kept have a quantity that decides it: the
coefficient of a loss, or the threshold of a rule. The controller looks at the density of a whole
step over all ranks and moves that quantity (:mod:`mone_megatron.methods.density_steps`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mone_megatron.methods.density_step import DensityReading
from mone_megatron.methods.density_steps import DENSITY_STEPS

# The first coefficient of a loss, which presses on nothing: arXiv 2412.14711 begins so.
COEFFICIENT_START = 1e-8
# No quantity goes lower: from 0 it would never come up again.
_LEAST = 1e-30
# Counts travel over ranks as three digits to this base, which fp32 adds exactly.
_BASE = 4096


@dataclass
class DensityController:
    """Holds a quantity, and moves it once a step.

    Attributes:
        step: ``mone.density.step``, how it moves.
        rate: how far.
        value: the quantity as it is.
        largest: what it never exceeds.
        raises: whether more of it keeps more; a loss's coefficient keeps less.
    """

    step: str
    rate: float
    value: float
    largest: float
    raises: bool = False

    def observe(self, density: float, target: float) -> None:
        """Moves the quantity by the density of one step."""
        factor = DENSITY_STEPS[self.step].factor
        if factor is None:
            return
        by = factor(DensityReading(density, target, self.rate))
        moved = self.value / by if self.raises else self.value * by
        self.value = min(max(moved, _LEAST), self.largest)


class DensityMeter:
    """Counts what one module keeps of all that it could keep, between two readings."""

    def __init__(self) -> None:
        """Counts nothing until ``counting`` is set."""
        self.counting = False
        self._kept: Tensor | None = None
        self._seen = 0

    def add(self, mask: Tensor) -> None:
        """Counts a mask of any shape, True at what is kept."""
        if self.counting:
            kept = mask.detach().sum()
            self._kept = kept if self._kept is None else self._kept + kept
            self._seen += mask.numel()

    def take(self, device: torch.device) -> Tensor:
        """Returns how many were kept, and of how many, int64 ``[2]``; and counts anew."""
        # Filled on the device: the host would wait for a number of its own to be copied there.
        seen = torch.full((), self._seen, dtype=torch.int64, device=device)
        kept = torch.zeros_like(seen) if self._kept is None else self._kept.to(device)
        counts = torch.stack([kept, seen])
        self._kept, self._seen = None, 0
        return counts


def to_digits(counts: Tensor) -> Tensor:
    """Returns counts ``[N]`` as fp32 ``[N, 3]``, whose sums over ranks are exact."""
    digits = (counts // _BASE**2, counts // _BASE % _BASE, counts % _BASE)
    return torch.stack(digits, dim=-1).float()


def from_digits(digits: Tensor) -> list[int]:
    """Returns the counts of sums of :func:`to_digits`."""
    return [int(high) * _BASE**2 + int(middle) * _BASE + int(low) for high, middle, low in digits]
