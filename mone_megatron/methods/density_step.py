"""Defines what a density step is: how a controller moves a quantity by the density it measured.

It imports no torch, so that names can be checked without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class DensityReading:
    """Holds what a controller knows after a step.

    Attributes:
        density: the share that was kept of all that could have been, in the step.
        target: the share that is wanted.
        rate: ``mone.density.rate`` (or ``model.router.density.rate``), above 0.
    """

    density: float
    target: float
    rate: float


@dataclass(frozen=True)
class DensityStep:
    """Describes one way to steer; ``mone.density.step`` names it.

    Attributes:
        name: its name in the configuration.
        formula: what it computes, for tables.
        source: the paper or place that it comes from.
        factor: by what a quantity that lowers the density is multiplied; one that raises it is
            divided. None steers nothing.
    """

    name: str
    formula: str
    source: str
    factor: Callable[[DensityReading], float] | None
