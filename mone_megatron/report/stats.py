"""Computes smoothing and confidence intervals: pure functions of numpy arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

# 97.5% quantiles of Student's t for 1 to 30 degrees of freedom.
_T_975 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip
_Z_975 = 1.959964


def default_span(num_points: int) -> float:
    """Returns a smoothing span, in points, that suits a curve of `num_points`: 3 to 200."""
    return float(min(max(num_points / 60, 3), 200))


def exponential_moving_average(values: FloatArray, span: float) -> FloatArray:
    """Returns the exponential moving average, bias-corrected as Adam corrects its moments.

    With ``beta = 1 - 2 / (span + 1)`` the k-th output is
    ``(1 - beta) * sum_j beta^(k-j) x_j / (1 - beta^k)``, so the first output is the first value.

    Args:
        values: ``[n]``. Entries that are not finite are skipped: they give NaN in their own place
            and do not touch the average of the others.
        span: Points the average looks back over, at least 1; 1 returns the values.

    Returns:
        ``[n]`` float64.

    Raises:
        ValueError: `span` is below 1.
    """
    if span < 1:
        raise ValueError(f"span is {span}: give 1 (no smoothing) or more")
    beta = 1 - 2 / (span + 1)
    smoothed = np.full(len(values), np.nan)
    average, weight = 0.0, 0.0
    for index, value in enumerate(values):
        if math.isfinite(value):
            average = beta * average + (1 - beta) * value
            weight = beta * weight + (1 - beta)
            smoothed[index] = average / weight
    return smoothed


def t_quantile_975(degrees_of_freedom: int) -> float:
    """Returns the 97.5% quantile of Student's t.

    It is taken from a table up to 30 degrees of freedom, and beyond from the Cornish-Fisher
    expansion in 1/df, which is within 1e-4 there.

    Raises:
        ValueError: fewer than 1 degree of freedom.
    """
    if degrees_of_freedom < 1:
        raise ValueError(f"degrees of freedom are {degrees_of_freedom}: at least 1 is needed")
    if degrees_of_freedom <= len(_T_975):
        return _T_975[degrees_of_freedom - 1]
    z, n = _Z_975, degrees_of_freedom
    return z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)


@dataclass(frozen=True)
class Interval:
    """Holds a mean and the half-width of its 95% confidence interval (NaN for a single sample)."""

    mean: float
    half_width: float
    count: int

    @property
    def low(self) -> float:
        """Returns the lower end."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """Returns the upper end."""
        return self.mean + self.half_width


def mean_interval(samples: Sequence[float]) -> Interval:
    """Returns the mean and its two-sided 95% Student-t interval.

    The half-width is ``t * s / sqrt(n)``, with ``n - 1`` under ``s``.

    One sample has no interval: its half-width is NaN. A NaN among the samples makes the mean NaN,
    so a diverged replicate is not hidden by the others.

    Raises:
        ValueError: no samples.
    """
    if not samples:
        raise ValueError("no samples: an interval needs at least one")
    values = np.asarray(samples, dtype=np.float64)
    mean = float(values.mean())
    if len(values) == 1:
        return Interval(mean, math.nan, 1)
    spread = float(values.std(ddof=1)) / math.sqrt(len(values))
    return Interval(mean, t_quantile_975(len(values) - 1) * spread, len(values))
