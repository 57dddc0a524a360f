"""How often the 95% intervals hold the truth, over many tables: the figures of the documents."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from scaling_tables import FLAME, build_table

from mone_megatron.lab.scaling_law.bootstrap import (
    Kind,
    bootstrap_isoflop,
    bootstrap_law,
    bounds,
)
from mone_megatron.lab.scaling_law.fit import fit_law
from mone_megatron.lab.scaling_law.isoflop import fit_isoflop

NOISE = 3e-3
RESAMPLES = 100


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rows", "normal"])
def test_coverage_of_the_law_with_twelve_runs(kind: Kind) -> None:
    held, tables = defaultdict(int), 60
    for seed in range(tables):
        table = build_table(
            sizes=(4e7, 1e8, 3e8, 1e9), budgets=(1e18, 1e19, 1e20), noise=NOISE, seed=100 + seed
        )
        fit = fit_law(table, starts=60, seed=seed)
        samples = bootstrap_law(fit, table, kind=kind, resamples=RESAMPLES, seed=seed)
        for name, truth in {**FLAME.coefficients, "a": FLAME.params_exponent}.items():
            found = bounds(
                [
                    law.params_exponent if name == "a" else law.coefficients[name]
                    for law in samples.laws
                ],
                0.95,
            )
            held[name] += found is not None and found.low <= truth <= found.high
    shares = {name: count / tables for name, count in held.items()}
    print(f"\n{kind}: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))
    # Three standard errors of 95% over 60 tables.
    assert min(shares.values()) > 0.86


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [4, 5, 8])
def test_coverage_of_parabolas(sizes: int) -> None:
    """Exact parabolas with N_opt = C^0.5, so that nothing but the noise is off."""
    held, tables = 0, 200
    for seed in range(tables):
        table = build_table(sizes=tuple(np.geomspace(5e8, 2e10, sizes)), budgets=(1e18, 1e19, 1e20))
        distance_R = np.log(table.params_R) - 0.5 * np.log(table.flops_R)
        noise_R = NOISE * np.random.default_rng(seed).standard_normal(len(table))
        table = table.with_loss((2 + 0.05 * distance_R**2) * np.exp(noise_R))
        fit = fit_isoflop(table)
        samples = bootstrap_isoflop(fit, table, resamples=RESAMPLES, seed=seed)
        assert samples is not None
        found = bounds([params.exponent for params, _ in samples.laws], 0.95)
        held += found is not None and found.low <= 0.5 <= found.high
    print(f"\n{sizes} sizes: {held / tables:.0%}")
    assert held / tables > 0.89
