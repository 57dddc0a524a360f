"""Bootstrap: how far the coefficients move when the runs had turned out otherwise.

Two kinds, for both fits:

- ``residuals``: N and D stay, as in a designed sweep; each run gets the fitted loss and an error
  drawn from those of the fit, enlarged by sqrt(n / (n - p)) for the p coefficients that took their
  share of them.
- ``rows``: runs are drawn with repetition. No assumption that errors are alike everywhere, but
  small tables lose points that they cannot do without; such draws are repeated and counted.

Legend: R rows (runs) of the table, M rows of a budget.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from tqdm import tqdm

from mone_megatron.analysis.scaling_law.fit import (
    Fit,
    check_identifiable,
    refit,
)
from mone_megatron.analysis.scaling_law.isoflop import (
    IsoFlopFit,
    Parabola,
    PowerLaw,
    fit_parabola,
    power_laws,
)
from mone_megatron.analysis.scaling_law.law import Law
from mone_megatron.analysis.scaling_law.table import Table
from mone_megatron.analysis.stats import FloatArray

Kind = Literal["residuals", "rows"]

DEFAULT_RESAMPLES = 500
# Draws of one resample before the table is called too small for it.
_MAX_DRAWS = 100
# An interval from fewer would be no interval.
_LEAST_RESAMPLES = 20


@dataclass(frozen=True)
class LawSamples:
    """The law fitted to each resample.

    Attributes:
        laws: one a resample.
        redrawn: draws that could not determine the coefficients and were repeated.
    """

    laws: tuple[Law, ...]
    redrawn: int


@dataclass(frozen=True)
class IsoFlopSamples:
    """Parabolas and power laws of each resample.

    Attributes:
        minima: ``{index of the budget among the used: [N_opt of the resamples that have one]}``.
        laws: power laws of N_opt and D_opt of the resamples with at least two minima.
        failed: resamples with fewer.
        missing: minima that resamples had not, all budgets together.
    """

    minima: tuple[FloatArray, ...]
    laws: tuple[tuple[PowerLaw, PowerLaw], ...]
    failed: int
    missing: int


@dataclass(frozen=True)
class Bounds:
    """A confidence interval."""

    low: float
    high: float


def check_resamples(resamples: int) -> None:
    """Refuse numbers of resamples that give no interval.

    Raises:
        ValueError: neither 0 nor at least 20.
    """
    if resamples != 0 and resamples < _LEAST_RESAMPLES:
        raise ValueError(
            f"--bootstrap is {resamples}: give 0 (no intervals) or at least {_LEAST_RESAMPLES}"
        )


def bounds(samples: Sequence[float] | FloatArray, confidence: float) -> Bounds | None:
    """Percentile interval of the finite samples; None when they are too few to have one."""
    values = np.asarray(samples, np.float64)
    values = values[np.isfinite(values)]
    if len(values) < _LEAST_RESAMPLES:
        return None
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return Bounds(float(low), float(high))


def bootstrap_law(
    fit: Fit,
    table: Table,
    *,
    kind: Kind = "residuals",
    resamples: int = DEFAULT_RESAMPLES,
    seed: int = 0,
    progress: str = "",
) -> LawSamples:
    """Refit the law to resamples of its table.

    Args:
        fit: the fit of `table`.
        table: the runs.
        kind: see the module.
        resamples: how many.
        seed: of the draws.
        progress: title of a progress line on stderr; "" for none.

    Raises:
        ValueError: rows are resampled and hardly any draw determines the coefficients.
    """
    random = np.random.default_rng(seed)
    neuron_term = fit.law.gamma is not None
    fitted_R = fit.law.loss(table.params_R, table.tokens_R, table.ratio_R)
    free = len(table) - len(fit.law.coefficients)
    errors_R = np.log(table.loss_R / fitted_R) * math.sqrt(len(table) / free)
    laws, redrawn = [], 0
    for _ in tqdm(
        range(resamples), desc=progress, unit="resample", disable=not progress, mininterval=1.0
    ):
        if kind == "residuals":
            drawn_R = random.choice(errors_R, len(table))
            sample = table.with_loss(fitted_R * np.exp(drawn_R))
        else:
            sample, repeats = _draw_rows(table, random, neuron_term)
            redrawn += repeats
        laws.append(refit(fit, sample, about=table))
    return LawSamples(tuple(laws), redrawn)


def bootstrap_isoflop(
    fit: IsoFlopFit,
    table: Table,
    *,
    kind: Kind = "residuals",
    resamples: int = DEFAULT_RESAMPLES,
    seed: int = 0,
) -> IsoFlopSamples | None:
    """Refit the used parabolas and their power laws to resamples within each budget.

    A resample's minimum may lie outside the sizes of its budget; only parabolas without a minimum
    are passed over.

    Returns:
        None for ``residuals`` when no budget has a fourth run, so that no parabola has an error.
    """
    random = np.random.default_rng(seed)
    # What a budget of three runs, whose parabola has no errors, borrows from the others.
    pool = np.concatenate(
        [_errors(parabola) for parabola in fit.used if len(parabola.rows_M) > 3] or [np.empty(0)]
    )
    if kind == "residuals" and not len(pool):
        return None
    minima: list[list[float]] = [[] for _ in fit.used]
    laws, failed, missing = [], 0, 0
    for _ in range(resamples):
        found: list[Parabola] = []
        for index, parabola in enumerate(fit.used):
            again = _resample_parabola(parabola, table, kind, pool, random)
            if again is None or not (0 < again.params < math.inf and 0 < again.tokens < math.inf):
                missing += 1
                continue
            minima[index].append(again.params)
            found.append(again)
        if len(found) < 2:
            failed += 1
        else:
            laws.append(power_laws(found))
    return IsoFlopSamples(
        tuple(np.array(values) for values in minima), tuple(laws), failed, missing
    )


def _draw_rows(table: Table, random: np.random.Generator, neuron_term: bool) -> tuple[Table, int]:
    for draw in range(_MAX_DRAWS):
        sample = table.take(random.integers(len(table), size=len(table)))
        try:
            check_identifiable(sample, neuron_term=neuron_term)
        except ValueError:
            continue
        return sample, draw
    raise ValueError(
        f"{table.source}: {_MAX_DRAWS} draws of rows left too few points to fit: "
        "resample residuals instead (--bootstrap-kind residuals)"
    )


def _resample_parabola(
    parabola: Parabola, table: Table, kind: Kind, pool: FloatArray, random: np.random.Generator
) -> Parabola | None:
    rows_M = parabola.rows_M
    if kind == "residuals":
        fitted_M = table.loss_R[rows_M] - parabola.residual_M
        errors = _errors(parabola) if len(rows_M) > 3 else pool
        return fit_parabola(table, rows_M, fitted_M + random.choice(errors, len(rows_M)))
    drawn_M = rows_M[random.integers(len(rows_M), size=len(rows_M))]
    if len(np.unique(table.params_R[drawn_M])) < 3:
        return None
    return fit_parabola(table, drawn_M, table.loss_R[drawn_M])


def _errors(parabola: Parabola) -> FloatArray:
    """Residuals, enlarged for the three coefficients; of more than three rows."""
    count = len(parabola.rows_M)
    return parabola.residual_M * math.sqrt(count / (count - 3))
