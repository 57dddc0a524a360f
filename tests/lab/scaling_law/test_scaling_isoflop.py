from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scaling_tables import FLAME, build_table

from mone_megatron.lab.scaling_law.isoflop import PowerLaw, fit_isoflop
from mone_megatron.lab.scaling_law.law import Law
from mone_megatron.lab.scaling_law.table import Table

BUDGETS = (1e18, 1e19, 1e20)


def centred(law: Law, spread: float, count: int = 5) -> Table:
    """Sizes about the true optimum of each budget, within a factor `spread` of it."""
    rows = []
    for budget in BUDGETS:
        best = law.optimum(budget, 6).params
        rows += [(best * factor, budget) for factor in np.geomspace(1 / spread, spread, count)]
    params_R, flops_R = np.array(rows).T
    tokens_R = flops_R / (6 * params_R)
    return Table(
        source="table",
        names=tuple(f"row {row + 1}" for row in range(len(rows))),
        params_R=params_R,
        tokens_R=tokens_R,
        loss_R=law.loss(params_R, tokens_R),
        flops_R=flops_R,
        ratio_R=None,
        flops_rule="6 N D",
    )


def test_an_exact_parabola_gives_its_minimum_and_law() -> None:
    # Minima at N = C^0.5, and C = 8 N D here, so D = C^0.5 / 8.
    table = centred(FLAME, 4)
    table = replace(table, tokens_R=table.flops_R / (8 * table.params_R))
    optimum_R = np.log(table.flops_R) * 0.5
    exact = table.with_loss(2 + 0.05 * (np.log(table.params_R) - optimum_R) ** 2)
    fit = fit_isoflop(exact, allow_outside=True)
    assert [one.params for one in fit.parabolas] == pytest.approx([1e9, 10**9.5, 1e10])
    assert fit.params.exponent == pytest.approx(0.5)
    assert fit.params.at(1e22) == pytest.approx(1e11)
    assert fit.tokens.at(1e22) == pytest.approx(1e11 / 8)
    assert [one.loss for one in fit.parabolas] == pytest.approx([2, 2, 2])
    assert [one.coefficients[2] for one in fit.parabolas] == pytest.approx([0.05] * 3)


def test_the_closer_the_sizes_the_closer_the_exponent() -> None:
    """Where alpha and beta differ a parabola is off, by less the nearer its runs are."""
    errors = [
        abs(fit_isoflop(centred(FLAME, spread)).params.at(1e22) / FLAME.optimum(1e22, 6).params - 1)
        for spread in (1.1, 2, 8)
    ]
    assert errors[0] < 1e-3 < errors[1] < errors[2]
    wide = centred(FLAME, 8, count=9)
    narrow = fit_isoflop(wide, width=2.9).params.at(1e22) / FLAME.optimum(1e22, 6).params - 1
    assert abs(narrow) < 0.5 * errors[2]
    assert {len(one.rows_M) for one in fit_isoflop(wide, width=2.9).parabolas} == {5}


def test_a_minimum_outside_the_sizes_is_left_out_and_said() -> None:
    table = build_table(sizes=(3e7, 6e7, 1.2e8, 2.4e8), budgets=(1e18, 3e18, 1e19, 3e20))
    fit = fit_isoflop(table)
    assert len(fit.parabolas) == 4
    assert [one.minimum for one in fit.parabolas] == ["inside", "inside", "inside", "outside"]
    assert len(fit.used) == 3
    assert fit.left_out[0].startswith("3e+20 FLOPs: the minimum, at")
    assert len(fit_isoflop(table, allow_outside=True).used) == 4


def test_a_parabola_that_opens_downwards_has_no_minimum() -> None:
    table = centred(FLAME, 2)
    loss_R = table.loss_R.copy()
    loss_R[:5] = 3 - (np.arange(5) - 2.0) ** 2 / 100
    fit = fit_isoflop(table.with_loss(loss_R))
    assert fit.parabolas[0].minimum == "none"
    assert np.isnan(fit.parabolas[0].params)
    assert "1e+18 FLOPs: the parabola has no minimum" in fit.left_out


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"one FLOP budget \(1e\+19\).*at least two"):
        fit_isoflop(build_table(budgets=(1e19,)))
    with pytest.raises(ValueError, match=r"keep ratios 0.25, 1: .*--only-keep-ratio"):
        fit_isoflop(build_table(ratios=(0.25, 1.0)))
    with pytest.raises(ValueError, match=r"0 FLOP budgets with a minimum .* needs 3 sizes"):
        fit_isoflop(build_table(sizes=(1e8, 2e8)))
    with pytest.raises(ValueError, match="--parabola-width is 1"):
        fit_isoflop(build_table(), width=1)


def test_a_power_law_out_of_all_reason_keeps_its_place() -> None:
    assert PowerLaw(0.0, 100.0).at(1e20) > 1e300
    assert PowerLaw(0.0, -100.0).at(1e20) < 1e-300
    assert PowerLaw(np.log(2.0), 0.5).at(1e20) == pytest.approx(2e10)
