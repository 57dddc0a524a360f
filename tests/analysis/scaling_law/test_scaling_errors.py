"""Bootstrap intervals and held-out errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scaling_tables import FLAME, build_table

from mone_megatron.analysis.scaling_law.bootstrap import (
    Bounds,
    bootstrap_isoflop,
    bootstrap_law,
    bounds,
)
from mone_megatron.analysis.scaling_law.fit import fit_law
from mone_megatron.analysis.scaling_law.holdout import errors_of, k_fold, largest_budgets
from mone_megatron.analysis.scaling_law.isoflop import fit_isoflop

STARTS = 40
FOLD = {"delta": 1e-3, "neuron_term": False, "starts": 20}


@pytest.mark.parametrize("kind", ["residuals", "rows"])
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


def test_residuals_are_enlarged_for_the_coefficients() -> None:
    """The spread of a resample's losses is the unbiased estimate of the noise."""
    table = build_table(noise=3e-3, seed=2)
    fit = fit_law(table, starts=STARTS)
    errors_R = np.log(table.loss_R / fit.law.loss(table.params_R, table.tokens_R))
    assert errors_R.std() < 3e-3  # The fit took some of it up.
    assert math.sqrt((errors_R**2).sum() / (len(table) - 5)) == pytest.approx(3e-3, rel=0.3)


def test_resampled_rows_that_determine_nothing_are_drawn_again() -> None:
    # Six points are the fewest: most draws with repetition have fewer.
    table = build_table(noise=1e-3, sizes=(1e8, 3e8, 1e9), budgets=(1e18, 1e19))
    fit = fit_law(table, starts=STARTS)
    with pytest.raises(ValueError, match="--bootstrap-kind residuals"):
        bootstrap_law(fit, table, kind="rows", resamples=50)
    larger = build_table(noise=1e-3, sizes=(1e8, 3e8, 1e9), budgets=(1e18, 1e19, 1e20))
    fit = fit_law(larger, starts=STARTS)
    assert bootstrap_law(fit, larger, kind="rows", resamples=10).redrawn > 0


def test_percentiles_by_hand() -> None:
    samples = np.arange(101.0)
    assert bounds(samples, 0.9) == Bounds(pytest.approx(5), pytest.approx(95))  # type: ignore[arg-type]
    assert bounds([*samples, math.nan], 0.9) == bounds(samples, 0.9)
    assert bounds(samples[:19], 0.9) is None


@pytest.mark.parametrize("kind", ["residuals", "rows"])
def test_isoflop_intervals_follow_the_noise(kind: str) -> None:
    found = []
    for noise in (1e-4, 2e-3):
        table = build_table(noise=noise, sizes=tuple(np.geomspace(5e7, 8e8, 8)), seed=3)
        fit = fit_isoflop(table)
        samples = bootstrap_isoflop(fit, table, kind=kind, resamples=100)  # type: ignore[arg-type]
        assert samples is not None
        exponents = bounds([params.exponent for params, _ in samples.laws], 0.95)
        assert exponents is not None
        assert exponents.low <= fit.params.exponent <= exponents.high
        found.append(exponents)
    # The parabolas' own misfit is in both.
    assert found[1].high - found[1].low > 1.05 * (found[0].high - found[0].low)


def test_parabolas_through_three_runs_have_no_errors_to_resample() -> None:
    table = build_table(sizes=(5e7, 2e8, 8e8), budgets=(1e18, 1e19))
    fit = fit_isoflop(table)
    assert bootstrap_isoflop(fit, table, resamples=20) is None


def test_a_budget_of_three_runs_borrows_the_errors_of_the_others() -> None:
    table = build_table(sizes=(5e7, 1e8, 2e8, 4e8, 8e8), budgets=(1e18, 1e19), noise=1e-3)
    # The smaller budget keeps three of its runs.
    table = table.take(np.delete(np.arange(10), [2, 6]))
    samples = bootstrap_isoflop(fit_isoflop(table), table, resamples=20)
    assert samples is not None
    assert samples.minima[0].std() > 0


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
