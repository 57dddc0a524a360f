from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mone_megatron.report.formatting import format_count, format_duration
from mone_megatron.report.stats import (
    exponential_moving_average,
    mean_interval,
    t_quantile_975,
)

# Losses, not subnormals: those lose their relative precision in any arithmetic.
FINITE = st.floats(-1e6, 1e6).map(lambda value: value if abs(value) > 1e-100 else 0.0)


def test_ema_hand_checked() -> None:
    # span 3: beta 0.5. Weights of (2, 4, 8): 1/7, 2/7, 4/7.
    smoothed = exponential_moving_average(np.array([2.0, 4.0, 8.0]), span=3)
    np.testing.assert_allclose(smoothed, [2, (2 + 2 * 4) / 3, (2 + 2 * 4 + 4 * 8) / 7])


def test_ema_passes_over_what_is_not_finite() -> None:
    smoothed = exponential_moving_average(np.array([2.0, math.nan, 4.0, math.inf]), span=3)
    np.testing.assert_allclose(smoothed, [2, math.nan, (2 + 2 * 4) / 3, math.nan])


@settings(deadline=None)
@given(st.lists(FINITE, min_size=1, max_size=50), st.floats(1, 100))
def test_ema_stays_within_what_it_has_seen(values: list[float], span: float) -> None:
    array = np.array(values)
    smoothed = exponential_moving_average(array, span)
    slack = 1e-9 * (1 + np.abs(array).max())
    assert smoothed[0] == pytest.approx(values[0])
    assert (smoothed >= np.minimum.accumulate(array) - slack).all()
    assert (smoothed <= np.maximum.accumulate(array) + slack).all()


@settings(deadline=None)
@given(FINITE, st.integers(1, 40), st.floats(1, 100))
def test_ema_of_a_constant_is_the_constant(value: float, count: int, span: float) -> None:
    smoothed = exponential_moving_average(np.full(count, value), span)
    np.testing.assert_allclose(smoothed, value, rtol=1e-9)


def test_ema_refuses_a_span_below_one() -> None:
    with pytest.raises(ValueError, match=r"span is 0\.5"):
        exponential_moving_average(np.ones(3), span=0.5)


def test_interval_hand_checked() -> None:
    # mean 2, standard deviation 1, t(2) = 4.3027.
    interval = mean_interval([1.0, 2.0, 3.0])
    assert interval.mean == 2
    assert interval.half_width == pytest.approx(4.3027 / math.sqrt(3))
    assert (interval.low + interval.high) / 2 == pytest.approx(2)
    assert interval.count == 3


def test_interval_of_one_sample_is_undefined_and_nan_is_not_hidden() -> None:
    assert math.isnan(mean_interval([1.0]).half_width)
    assert math.isnan(mean_interval([1.0, math.nan]).mean)
    with pytest.raises(ValueError, match="no samples"):
        mean_interval([])


def test_t_quantiles() -> None:
    assert t_quantile_975(1) == 12.7062
    assert t_quantile_975(30) == 2.0423
    # Beyond the table, against published values.
    for degrees, expected in ((31, 2.0395), (40, 2.0211), (60, 2.0003), (120, 1.9799)):
        assert t_quantile_975(degrees) == pytest.approx(expected, abs=1e-4)
    quantiles = [t_quantile_975(n) for n in range(1, 60)]
    assert quantiles == sorted(quantiles, reverse=True)
    with pytest.raises(ValueError, match="at least 1"):
        t_quantile_975(0)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (math.nan, "-"),
        (0, "0"),
        (948, "948"),
        (1024, "1.02K"),
        (999_960, "1.00M"),
        (12_345_678, "12.3M"),
        (925_000_000, "925M"),
        (30.5e9, "30.5B"),
        (2e12, "2.00T"),
    ],
)
def test_format_count(value: float | None, text: str) -> None:
    assert format_count(value) == text


def test_format_duration() -> None:
    assert format_duration(None) == "-"
    assert format_duration(3.24) == "3.2 s"
    assert format_duration(100) == "100 s"
    assert format_duration(300) == "5 min"
    assert format_duration(3600 * 2 + 120) == "2 h 2 min"
    assert format_duration(3600 * 50) == "2 d 2 h"
