"""Bootstrap intervals and held-out errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scaling_tables import FLAME, build_table

from mone_megatron.lab.scaling_law.bootstrap import (
    Bounds,
    _normal_errors,
    bootstrap_isoflop,
    bootstrap_law,
    bounds,
)
from mone_megatron.lab.scaling_law.fit import fit_law
from mone_megatron.lab.scaling_law.holdout import errors_of, k_fold, largest_budgets
from mone_megatron.lab.scaling_law.isoflop import fit_isoflop

STARTS = 40
FOLD = {"delta": 1e-3, "neuron_term": False, "starts": 20}


@pytest.mark.parametrize("kind", ["rows", "normal"])
def test_intervals_cover_the_truth_and_widen_with_the_noise(kind: str) -> None:
    widths = []
    for noise in (1e-3, 4e-3):
        table = build_table(noise=noise, seed=1)
        fit = fit_law(table, starts=STARTS)
        samples = bootstrap_law(fit, table, kind=kind, resamples=25)  # type: ignore[arg-type]
        assert len(samples.laws) == 25
        for name, truth in FLAME.coefficients.items():
            found = bounds([law.coefficients[name] for law in samples.laws], 0.95)
            assert found is not None
            assert found.low <= truth <= found.high, name
            if name == "beta":
                widths.append(found.high - found.low)
    assert 2 < widths[1] / widths[0] < 8


def test_normal_errors_are_as_wide_as_so_few_runs_leave_open() -> None:
    """Variance 1 estimated with 2 degrees of freedom: Student's t."""
    random = np.random.default_rng(0)
    draws = np.stack([_normal_errors(2.0, 2, 10, random) for _ in range(4000)])
    assert np.quantile(draws, 0.975) == pytest.approx(4.3027, rel=0.05)
    assert draws.shape == (4000, 10)


def test_resampled_rows_that_determine_nothing_are_drawn_again() -> None:
    # Six points are the fewest: most draws with repetition have fewer.
    table = build_table(noise=1e-3, sizes=(1e8, 3e8, 1e9), budgets=(1e18, 1e19))
    fit = fit_law(table, starts=STARTS)
    with pytest.raises(ValueError, match="--bootstrap-kind normal"):
        bootstrap_law(fit, table, kind="rows", resamples=50)
    larger = build_table(noise=1e-3, sizes=(1e8, 3e8, 1e9), budgets=(1e18, 1e19, 1e20))
    fit = fit_law(larger, starts=STARTS)
    assert bootstrap_law(fit, larger, kind="rows", resamples=10).redrawn > 0


def test_percentiles_by_hand() -> None:
    samples = np.arange(101.0)
    assert bounds(samples, 0.9) == Bounds(pytest.approx(5), pytest.approx(95))  # type: ignore[arg-type]
    assert bounds([*samples, math.nan], 0.9) == bounds(samples, 0.9)
    assert bounds(samples[:19], 0.9) is None


def test_isoflop_intervals_are_student_t_of_the_minimum() -> None:
    """One budget's minimum by the delta method: N_opt = exp(center - c1 / (2 c2))."""
    sizes = tuple(np.geomspace(5e7, 8e8, 8))
    table = build_table(sizes=sizes, budgets=(3e18, 3e19))
    center_R = np.log(3e8) + 0.1 * (table.flops_R > 1e19)
    noise_R = 1e-4 * np.random.default_rng(0).standard_normal(len(table))
    table = table.with_loss(3 + 0.1 * (np.log(table.params_R) - center_R) ** 2 + noise_R)
    fit = fit_isoflop(table)
    samples = bootstrap_isoflop(fit, table, resamples=1000)
    assert samples is not None
    assert samples.failed == samples.missing == 0
    one = fit.used[0]
    x_M = np.log(table.params_R[one.rows_M]) - one.center
    design = np.stack([np.ones_like(x_M), x_M, x_M**2], axis=1)
    _, c1, c2 = one.coefficients
    slope = np.array([0, -1 / (2 * c2), c1 / (2 * c2**2)])
    variance = sum(float(p.residual_M @ p.residual_M) for p in fit.used) / 10
    error = math.sqrt(variance * slope @ np.linalg.inv(design.T @ design) @ slope)
    found = bounds(np.log(samples.minima[0]), 0.95)
    assert found is not None
    width = 2 * 2.2281 * error  # t, 10 degrees of freedom
    assert found.high - found.low == pytest.approx(width, rel=0.15)
    assert (found.low + found.high) / 2 == pytest.approx(math.log(one.params), abs=0.1 * width)


def test_parabolas_through_three_runs_have_no_errors() -> None:
    table = build_table(sizes=(5e7, 2e8, 8e8), budgets=(1e18, 1e19))
    fit = fit_isoflop(table)
    assert bootstrap_isoflop(fit, table, resamples=20) is None


def test_held_out_budgets_are_not_fitted() -> None:
    """A law that breaks beyond the fitted budgets shows it in the held-out error alone."""
    table = build_table(noise=1e-4)
    largest = table.flops_R == table.flops_R.max()
    table = table.with_loss(np.where(largest, 1.02 * table.loss_R, table.loss_R))
    errors = largest_budgets(table, 1, 0.05, **FOLD)
    assert errors.rows_R.tolist() == np.flatnonzero(largest).tolist()
    assert errors.mean_absolute == pytest.approx(0.0196, rel=0.05)
    assert errors.bias == pytest.approx(1 / 1.02 - 1, rel=0.05)
    assert errors.largest >= errors.mean_absolute
    with pytest.raises(ValueError, match="has 4 FLOP budgets: hold out 1 to 3"):
        largest_budgets(table, 4, 0.05, **FOLD)


def test_folds_predict_every_run_and_keep_replicates_together() -> None:
    table = build_table(noise=1e-3)
    twice = table.take(np.repeat(np.arange(len(table)), 2))
    # One replicate of each point is far off in a way that no other point is.
    loss_R = twice.loss_R * np.tile([1.0, 1.001], len(table))
    errors = k_fold(twice.with_loss(loss_R), 3, **FOLD)
    assert len(errors.predicted_R) == len(twice)
    np.testing.assert_array_equal(errors.predicted_R[::2], errors.predicted_R[1::2])
    fit = fit_law(twice, starts=20)
    inside = errors_of(fit.law, twice, np.arange(len(twice)))
    assert errors.mean_absolute > 0.9 * inside.mean_absolute
    with pytest.raises(ValueError, match="has 24 different points: give 2 to 24 folds"):
        k_fold(table, 25, **FOLD)


def test_a_fold_too_small_to_fit_says_so() -> None:
    table = build_table(sizes=(1e8, 3e8, 1e9), budgets=(1e18, 1e19), noise=1e-3)
    with pytest.raises(ValueError, match="too few for 5 coefficients"):
        k_fold(table, 2, **FOLD)
