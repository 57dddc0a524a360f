"""Standard errors: those of formulas, of the harness, and of brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.metrics import mean_stderr

from mone_megatron.evaluation.estimates import bootstrapped, difference, ratio

values = st.lists(st.floats(-100, 100), min_size=2, max_size=40)


@given(values)
def test_a_mean_has_the_harness_standard_error(numbers: list[float]) -> None:
    estimate = ratio(numbers)
    assert estimate.value == pytest.approx(np.mean(numbers), abs=1e-9)
    assert estimate.stderr == pytest.approx(mean_stderr(numbers), abs=1e-9)


@given(values, st.integers(0, 2**32 - 1))
def test_a_paired_difference_has_the_standard_error_of_the_differences(
    numbers: list[float], seed: int
) -> None:
    others = np.random.default_rng(seed).normal(size=len(numbers))
    change = difference(ratio(numbers), ratio(others), same_samples=True)
    assert change.paired
    assert change.value == pytest.approx(float(np.mean(numbers - others)), abs=1e-9)
    assert change.stderr == pytest.approx(mean_stderr(list(numbers - others)), abs=1e-9)


def test_a_model_does_not_differ_from_itself() -> None:
    estimate = ratio([1.0, 2.0, 5.0], [3.0, 4.0, 9.0], exponential=True)
    change = difference(estimate, estimate, same_samples=True)
    assert (change.value, change.stderr) == (0.0, 0.0)


def test_other_samples_are_not_paired() -> None:
    one, other = ratio([1.0, 2.0, 3.0]), ratio([5.0, 7.0, 6.0])
    change = difference(one, other, same_samples=False)
    assert not change.paired
    assert change.stderr == pytest.approx(math.hypot(one.stderr, other.stderr))


@pytest.mark.parametrize("exponential", [False, True])
def test_the_delta_method_agrees_with_the_bootstrap(exponential: bool) -> None:
    generator = np.random.default_rng(1)
    below = generator.integers(20, 60, size=300).astype(float)
    above = below * generator.normal(2.0, 0.5, size=300)
    analytic = ratio(above, below, scale=0.7, exponential=exponential)

    def statistic(pairs: list[tuple[float, float]]) -> float:
        first, second = np.array(pairs).T
        value = 0.7 * float(first.sum() / second.sum())
        return math.exp(value) if exponential else value

    brute = bootstrapped(statistic, list(zip(above, below, strict=True)))
    assert analytic.value == pytest.approx(brute.value)
    # A bootstrap of 1000 resamples is itself uncertain by 1 / sqrt(2000) = 2.2%.
    assert analytic.stderr == pytest.approx(brute.stderr, rel=0.1)


def test_bootstraps_of_two_models_share_their_resamples() -> None:
    numbers = list(np.random.default_rng(0).normal(size=50))
    one = bootstrapped(np.median, numbers)  # type: ignore[arg-type]
    other = bootstrapped(np.median, [number + 3 for number in numbers])  # type: ignore[arg-type]
    change = difference(other, one, same_samples=True)
    assert change.paired
    assert change.value == pytest.approx(3.0)
    assert change.stderr == pytest.approx(0.0, abs=1e-12)


def test_one_sample_has_no_error_and_none_is_refused() -> None:
    assert math.isnan(ratio([1.0]).stderr)
    assert math.isnan(bootstrapped(max, [1.0]).stderr)
    with pytest.raises(ValueError, match="no samples"):
        ratio([])
