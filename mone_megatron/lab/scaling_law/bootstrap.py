"""Estimates by bootstrap how far the coefficients move had the runs turned out otherwise.

Two kinds for the law:

- ``rows``: runs are drawn with repetition. Nothing is assumed of their errors, but small tables
  lose points that they cannot do without; such draws are repeated and counted.
- ``normal``: N and D stay, as in a designed sweep, and each run gets the fitted loss and a normal
  error of the log loss. Its variance is drawn too, s^2 nu / chi^2_nu with nu = n - p, as much as n
  runs leave it open; so few runs give wide intervals, as Student's t does.

Resampling the residuals themselves would not do: delta 1e-3 makes the fit nearly one of absolute
errors, which passes through p of the runs and leaves them none. IsoFLOP parabolas, of which each
has few runs, take normal errors with one variance for all budgets. docs/scaling-laws.md has how
often the intervals hold the truth.

Legend: R rows (runs) of the table, M rows of a budget.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from tqdm import tqdm

from mone_megatron.lab.scaling_law.fit import (
    Fit,
    check_identifiable,
    refit,
)
from mone_megatron.lab.scaling_law.isoflop import (
    IsoFlopFit,
    Parabola,
    PowerLaw,
    fit_parabola,
    power_laws,
)
from mone_megatron.lab.scaling_law.law import Law
from mone_megatron.lab.scaling_law.table import Table
from mone_megatron.report.stats import FloatArray

Kind = Literal["rows", "normal"]

DEFAULT_RESAMPLES = 500
# Draws of one resample before the table is called too small for it.
_MAX_DRAWS = 100
# An interval from fewer would be no interval.
_LEAST_RESAMPLES = 20


@dataclass(frozen=True)
class LawSamples:
    """Holds the law fitted to each resample.

    Attributes:
        laws: one a resample.
        redrawn: draws that could not determine the coefficients and were repeated.
    """

    laws: tuple[Law, ...]
    redrawn: int


@dataclass(frozen=True)
class IsoFlopSamples:
    """Holds the parabolas' minima and power laws of each resample.

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
    """Holds the ends of a confidence interval."""

    low: float
    high: float


def check_resamples(resamples: int) -> None:
    """Refuses numbers of resamples that give no interval.

    Raises:
        ValueError: neither 0 nor at least 20.
    """
    if resamples != 0 and resamples < _LEAST_RESAMPLES:
        raise ValueError(
            f"--bootstrap is {resamples}: give 0 (no intervals) or at least {_LEAST_RESAMPLES}"
        )


def bounds(samples: Sequence[float] | FloatArray, confidence: float) -> Bounds | None:
    """Returns the percentile interval of the finite samples; None when they are too few."""
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
    kind: Kind = "rows",
    resamples: int = DEFAULT_RESAMPLES,
    seed: int = 0,
    progress: str = "",
) -> LawSamples:
    """Refits the law to resamples of its table.

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
    errors_R = np.log(table.loss_R / fitted_R)
    free = len(table) - len(fit.law.coefficients)
    laws, redrawn = [], 0
    for _ in tqdm(
        range(resamples), desc=progress, unit="resample", disable=not progress, mininterval=1.0
    ):
        if kind == "normal":
            drawn_R = _normal_errors(float(errors_R @ errors_R), free, len(table), random)
            sample = table.with_loss(fitted_R * np.exp(drawn_R))
        else:
            sample, repeats = _draw_rows(table, random, neuron_term)
            redrawn += repeats
        laws.append(refit(fit, sample, about=table))
    return LawSamples(tuple(laws), redrawn)


def bootstrap_isoflop(
    fit: IsoFlopFit, table: Table, *, resamples: int = DEFAULT_RESAMPLES, seed: int = 0
) -> IsoFlopSamples | None:
    """Refits the used parabolas and their power laws with normal errors of the loss.

    A resample's minimum may lie outside the sizes of its budget; only parabolas without a minimum
    are passed over.

    Returns:
        None when no budget has a fourth run, so that no parabola has an error.
    """
    random = np.random.default_rng(seed)
    free = sum(len(parabola.rows_M) - 3 for parabola in fit.used)
    if not free:
        return None
    squares = sum(float(parabola.residual_M @ parabola.residual_M) for parabola in fit.used)
    rows = np.concatenate([parabola.rows_M for parabola in fit.used])
    minima: list[list[float]] = [[] for _ in fit.used]
    laws, failed, missing = [], 0, 0
    for _ in range(resamples):
        errors_R = np.zeros(len(table))
        errors_R[rows] = _normal_errors(squares, free, len(rows), random)
        found: list[Parabola] = []
        for index, parabola in enumerate(fit.used):
            fitted_M = table.loss_R[parabola.rows_M] - parabola.residual_M
            again = fit_parabola(table, parabola.rows_M, fitted_M + errors_R[parabola.rows_M])
            if not (0 < again.params < math.inf and 0 < again.tokens < math.inf):
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


def _normal_errors(
    squares: float, free: int, count: int, random: np.random.Generator
) -> FloatArray:
    """Draws `count` normal errors.

    Their variance fits a sum of squares with `free` degrees of freedom.
    """
    return random.normal(0.0, math.sqrt(squares / random.chisquare(free)), count)


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
        "take normal errors instead (--bootstrap-kind normal), or no intervals (--bootstrap 0)"
    )
