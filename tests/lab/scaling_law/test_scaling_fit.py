from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scaling_tables import FLAME, FLAME_BUDGETS, build_table

from mone_megatron.lab.scaling_law.fit import Objective, fit_law, refit
from mone_megatron.lab.scaling_law.law import Law

STARTS = 40
CHINCHILLA = Law(E=1.69, A=406.4, alpha=0.34, B=410.7, beta=0.28)
WITH_NEURONS = dataclasses.replace(CHINCHILLA, gamma=0.3)


@pytest.mark.parametrize("law", [FLAME, CHINCHILLA], ids=["flame", "chinchilla"])
def test_recovers_published_fits_from_their_own_tables(law: Law) -> None:
    fit = fit_law(build_table(law), starts=STARTS)
    for name, value in law.coefficients.items():
        assert fit.law.coefficients[name] == pytest.approx(value, rel=1e-5), name
    assert fit.at_best > 1


def test_recovers_the_activated_neuron_term() -> None:
    table = build_table(WITH_NEURONS, budgets=FLAME_BUDGETS[:3], ratios=(0.25, 0.5, 1.0))
    fit = fit_law(table, neuron_term=True, starts=STARTS)
    for name, value in WITH_NEURONS.coefficients.items():
        assert fit.law.coefficients[name] == pytest.approx(value, rel=1e-5), name
    # Without the term the same losses cannot be fitted.
    assert fit_law(table, starts=STARTS).objective > 1e6 * (fit.objective + 1e-6)


def test_the_huber_loss_shrugs_off_a_failed_run() -> None:
    table = build_table(noise=1e-4)
    loss_R = table.loss_R.copy()
    loss_R[5] *= 1.5
    robust = fit_law(table.with_loss(loss_R), starts=STARTS).law
    squares = fit_law(table.with_loss(loss_R), starts=STARTS, delta=10.0).law
    assert robust.beta == pytest.approx(FLAME.beta, rel=0.02)
    assert abs(squares.beta / FLAME.beta - 1) > 0.05


@pytest.mark.parametrize("neuron_term", [False, True])
@pytest.mark.parametrize("delta", [1e-3, 0.5])
def test_gradient_is_that_of_the_objective(neuron_term: bool, delta: float) -> None:
    table = build_table(ratios=(0.5, 1.0), noise=0.05)
    objective = Objective(table, delta, neuron_term=neuron_term)
    point_P = np.array([0.4, -0.3, 0.3, -0.8, 0.5, 0.1][: 5 + neuron_term])
    _, gradient_P = objective(point_P)
    for index in range(len(point_P)):
        step_P = np.zeros_like(point_P)
        step_P[index] = 1e-6
        slope = (objective(point_P + step_P)[0] - objective(point_P - step_P)[0]) / 2e-6
        assert gradient_P[index] == pytest.approx(slope, rel=1e-4, abs=1e-3)


def test_objective_by_hand() -> None:
    # One residual of 0.5 delta and one of 3 delta, in units of delta^2: 0.125 and 3 - 0.5.
    table = build_table(sizes=(1e8,), budgets=(1e18, 1e19))
    objective = Objective(table, 1e-3, neuron_term=False)
    theta_P = np.array([1.0, -50.0, 0.0, -50.0, 0.0])
    near = table.with_loss(np.exp([1 - 0.5e-3, 1 + 3e-3]))
    value, _ = Objective(near, 1e-3, neuron_term=False)(theta_P)
    assert value == pytest.approx(0.125 + 2.5, rel=1e-9)
    assert pytest.approx(np.e) == objective.law(theta_P).E


def test_starts_are_the_grid_of_4500_at_any_means() -> None:
    objective = Objective(build_table(), 1e-3, neuron_term=False)
    starts_SP = objective.starts(4500, 0)
    laws = [objective.law(start_P) for start_P in starts_SP[::487]]
    for law in laws:
        assert np.isclose(np.log(law.A) % 5, [0, 5]).any()
        assert np.isclose(np.log(law.B) % 5, [0, 5]).any()
    assert len(np.unique(starts_SP, axis=0)) == 4500
    assert len(objective.starts(7, 0)) == 7
    for count in (0, 4501):
        with pytest.raises(ValueError, match=f"starts is {count}: give 1 to 4500"):
            objective.starts(count, 0)


@pytest.mark.parametrize("neuron_term", [False, True])
def test_a_point_at_other_means_is_the_same_law(neuron_term: bool) -> None:
    table = build_table(ratios=(0.25, 1.0))
    origin = Objective(table, 1e-3, neuron_term=neuron_term)
    other = Objective(table.take(np.arange(5)), 1e-3, neuron_term=neuron_term)
    point_P = np.array([0.4, -0.3, 0.3, -0.8, 0.5, 0.1][: 5 + neuron_term])
    moved_P = other.from_means_of(origin, point_P[None])[0]
    assert other.law(moved_P).coefficients == pytest.approx(origin.law(point_P).coefficients)
    assert abs(moved_P[1] - point_P[1]) > 0.01


def test_refit_goes_on_from_the_optimum_at_other_means() -> None:
    table = build_table(noise=1e-3)
    fit = fit_law(table, starts=STARTS)
    half = table.take(np.arange(0, len(table), 2))
    again = refit(fit, half, about=table)
    assert again.coefficients == pytest.approx(
        fit_law(half, starts=STARTS).law.coefficients, rel=1e-4
    )


@settings(deadline=None, max_examples=50)
@given(
    st.floats(0.1, 1.0),
    st.floats(0.1, 1.0),
    st.floats(1e17, 1e23),
    st.floats(1, 12),
    st.floats(0.1, 1.0),
    st.floats(0, 1),
)
def test_the_optimum_is_the_least_loss_of_its_budget(
    alpha: float, beta: float, flops: float, cost: float, ratio: float, gamma: float
) -> None:
    law = Law(E=1.7, A=300.0, alpha=alpha, B=500.0, beta=beta, gamma=gamma)
    best = law.optimum(flops, cost, ratio)
    assert cost * best.params * best.tokens == pytest.approx(flops)
    for factor in (0.9, 1.1):
        params = best.params * factor
        other = law.loss(np.array(params), np.array(flops / cost / params), np.array(ratio))
        assert float(other) > best.loss
    # Budgets follow the exponents.
    assert law.optimum(10 * flops, cost, ratio).params == pytest.approx(
        best.params * 10**law.params_exponent
    )


def test_no_optimum_where_size_does_not_help() -> None:
    with pytest.raises(ValueError, match=r"alpha is -0.1 .* only positive ones"):
        dataclasses.replace(FLAME, alpha=-0.1).optimum(1e20, 6)


@pytest.mark.parametrize(
    ("sizes", "budgets", "message"),
    [
        ((1e8, 2e8, 4e8), (1e18,), "3 different points, too few for 5 coefficients: at least 6"),
        ((1e8, 2e8), (1e18, 2e18, 4e18, 8e18), "2 different params: at least 3"),
        ((1e8, 2e8, 3e8, 4e8, 5e8, 6e8, 7e8), (1e18,), r"one FLOP budget.*vary tokens"),
    ],
)
def test_tables_that_determine_nothing_are_refused(
    sizes: tuple[float, ...], budgets: tuple[float, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fit_law(build_table(sizes=sizes, budgets=budgets), starts=1)


def test_replicates_are_no_points_of_their_own() -> None:
    table = build_table(sizes=(1e8, 2e8, 4e8), budgets=(1e18,))
    with pytest.raises(ValueError, match="3 different points"):
        fit_law(table.take(np.tile(np.arange(3), 4)), starts=1)


def test_the_neuron_term_needs_ratios_that_vary_by_themselves() -> None:
    with pytest.raises(ValueError, match="has no keep ratios"):
        fit_law(build_table(), neuron_term=True, starts=1)
    with pytest.raises(ValueError, match="1 different keep ratios"):
        fit_law(build_table(ratios=(0.5,)), neuron_term=True, starts=1)
    table = build_table()
    bound = dataclasses.replace(table, ratio_R=(table.params_R / table.params_R.max()) ** 0.3)
    with pytest.raises(ValueError, match="keep ratio follows params and tokens"):
        fit_law(bound, neuron_term=True, starts=1)


@pytest.mark.parametrize("delta", [0.0, -1.0, float("nan"), float("inf")])
def test_delta_is_positive(delta: float) -> None:
    with pytest.raises(ValueError, match="delta is"):
        fit_law(build_table(), delta=delta, starts=1)


def test_the_same_seed_gives_the_same_fit() -> None:
    table = build_table(noise=3e-3)
    fits = [fit_law(table, starts=5, seed=3) for _ in range(2)]
    for one, other in itertools.pairwise(fits):
        assert one.law == other.law
