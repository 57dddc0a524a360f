"""Computes numbers with standard errors, and differences of two models on the same samples.

Almost every metric is a smooth function of a ratio of two sums over samples: an accuracy (the sum
of hits over the number of samples), a loss (nats over tokens), bits per byte. Its standard error
then follows from each sample's influence on it (the delta method), and the difference of two models
on the same samples has the standard error of the differences of influences. Every other statistic
is bootstrapped, with the same resamples for every model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

BOOTSTRAP_RESAMPLES = 1000
_BOOTSTRAP_SEED = 1234


@dataclass(frozen=True)
class Estimate:
    """Holds a statistic of ``count`` samples, with what its standard error is made of.

    Attributes:
        value: the statistic.
        count: samples.
        influence: ``[count]``, what each sample adds to the error; mean 0. Empty when bootstrapped.
        replicates: ``[resamples]``, the statistic of each resample. Empty when not bootstrapped.
    """

    value: float
    count: int
    influence: FloatArray
    replicates: FloatArray

    @property
    def stderr(self) -> float:
        """Returns the standard error; NaN for a single sample."""
        return _stderr(self.influence, self.replicates)


@dataclass(frozen=True)
class Difference:
    """Holds one model's estimate minus another's."""

    value: float
    stderr: float
    # Whether both were measured on the same samples, so that what is common to both cancels.
    paired: bool


def ratio(
    numerators: Sequence[float] | FloatArray,
    denominators: Sequence[float] | FloatArray | None = None,
    *,
    scale: float = 1.0,
    exponential: bool = False,
) -> Estimate:
    """Estimates ``scale * sum(numerators) / sum(denominators)``, or e to the power of it.

    Args:
        numerators: ``[n]``.
        denominators: ``[n]``, above 0; None for ones, which gives the mean.
        scale: a constant factor.
        exponential: the estimate is ``exp`` of the scaled ratio, as a perplexity is.

    Raises:
        ValueError: no samples.
    """
    above = np.asarray(numerators, dtype=np.float64)
    below = np.ones_like(above) if denominators is None else np.asarray(denominators, np.float64)
    if not above.size:
        raise ValueError("no samples: an estimate needs at least one")
    quotient = float(above.sum() / below.sum())
    value, slope = scale * quotient, scale
    if exponential:
        # A model that gives the text no chance at all has an infinite perplexity.
        value = math.exp(value) if value < 700 else math.inf
        slope = scale * value
    influence = slope * (above - quotient * below) / below.mean()
    return Estimate(value, above.size, influence, np.zeros(0))


def bootstrapped(
    statistic: Callable[[list[Any]], float],
    samples: Sequence[Any],
    resamples: int = BOOTSTRAP_RESAMPLES,
) -> Estimate:
    """Estimates any statistic of samples.

    The resamples depend on the number of samples alone, so those of two models pair up.

    Raises:
        ValueError: no samples.
    """
    if not samples:
        raise ValueError("no samples: an estimate needs at least one")
    generator = np.random.default_rng(_BOOTSTRAP_SEED)
    count = len(samples)
    replicates = [
        float(statistic([samples[index] for index in generator.integers(count, size=count)]))
        for _ in range(resamples if count > 1 else 0)
    ]
    return Estimate(
        float(statistic(list(samples))), count, np.zeros(0), np.asarray(replicates, np.float64)
    )


def difference(one: Estimate, other: Estimate, *, same_samples: bool) -> Difference:
    """Returns ``one`` minus ``other``, with its standard error.

    Args:
        one: an estimate.
        other: the same statistic of another model.
        same_samples: whether sample i of both is the same question or text.
    """
    paired = (
        same_samples
        and one.influence.shape == other.influence.shape
        and one.replicates.shape == other.replicates.shape
    )
    if paired:
        stderr = _stderr(one.influence - other.influence, one.replicates - other.replicates)
    else:
        stderr = math.hypot(one.stderr, other.stderr)
    return Difference(one.value - other.value, stderr, paired)


def _stderr(influence: FloatArray, replicates: FloatArray) -> float:
    if replicates.size > 1:
        return float(replicates.std(ddof=1))
    if influence.size > 1:
        # Their mean is 0 by construction; one degree of freedom went into the value.
        return float(math.sqrt((influence**2).sum() / (influence.size - 1) / influence.size))
    return math.nan
