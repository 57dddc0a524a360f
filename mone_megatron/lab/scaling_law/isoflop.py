"""Fits, for each FLOP budget, a parabola of the loss in log N, and power laws of the minima.

Chinchilla's second approach, as FLAME-MoE uses it. A parabola is the second-order expansion of the
law about its optimum, so the further the sizes of a budget spread, the more its minimum is off
(arXiv 2603.22339): the parametric fit has no such error, and docs/scaling-laws.md measures it.

Legend: R rows (runs) of the table, M rows of a budget.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mone_megatron.lab.scaling_law.table import IntArray, Table
from mone_megatron.report.stats import FloatArray

DEFAULT_TOLERANCE = 0.05
# exp of it is a float.
_LARGEST_LOG = 700.0

MinimumKind = Literal["inside", "outside", "none"]


@dataclass(frozen=True)
class Parabola:
    """Describes one budget by ``loss = c0 + c1 x + c2 x^2`` with ``x = log N - center``.

    Attributes:
        flops: geometric mean of the FLOPs of the rows.
        rows_M: rows of the table.
        center: mean of log N.
        coefficients: c0, c1, c2.
        minimum: where the parabola has its minimum: ``inside`` the sizes of the budget, ``outside``
            them, or ``none`` when it does not open upwards.
        params: N at the minimum; NaN when there is none.
        tokens: D there, by the line of log D over log N through the budget's rows.
        loss: the parabola's least loss.
        residual_M: loss less the parabola.
    """

    flops: float
    rows_M: IntArray
    center: float
    coefficients: tuple[float, float, float]
    minimum: MinimumKind
    params: float
    tokens: float
    loss: float
    residual_M: FloatArray

    def loss_at(self, params: FloatArray) -> FloatArray:
        """Returns the parabola's loss at these N."""
        x = np.log(params) - self.center
        c0, c1, c2 = self.coefficients
        return np.asarray(c0 + c1 * x + c2 * x * x)


@dataclass(frozen=True)
class PowerLaw:
    """Is the law ``value = exp(log_coefficient) * C^exponent``."""

    log_coefficient: float
    exponent: float

    def at(self, flops: float) -> float:
        """Returns the value at a budget, cut off where it is out of all reason.

        Resamples of a poor table reach such values, and keep their place in the percentiles.
        """
        power = self.log_coefficient + self.exponent * math.log(flops)
        return math.exp(min(max(power, -_LARGEST_LOG), _LARGEST_LOG))


@dataclass(frozen=True)
class IsoFlopFit:
    """Holds the parabolas of all budgets, ascending, and the power laws through their minima.

    Attributes:
        parabolas: one a budget of at least three sizes.
        used: the parabolas whose minima the power laws go through.
        left_out: budgets that have no say, each with the reason.
        params, tokens: N_opt and D_opt over C.
    """

    parabolas: tuple[Parabola, ...]
    used: tuple[Parabola, ...]
    left_out: tuple[str, ...]
    params: PowerLaw
    tokens: PowerLaw


def fit_isoflop(
    table: Table,
    *,
    tolerance: float = DEFAULT_TOLERANCE,
    width: float | None = None,
    allow_outside: bool = False,
) -> IsoFlopFit:
    """Fits the parabolas of all budgets and the power laws through their minima.

    Args:
        table: runs of one keep ratio at several budgets.
        tolerance: how far apart the FLOPs of one budget may be, relatively.
        width: take only the sizes within this factor of a budget's best one, where a parabola is
            a good picture of the law; None takes all.
        allow_outside: take minima outside the sizes of their budget too.

    Raises:
        ValueError: rows of several keep ratios, or fewer than two budgets with a minimum.
    """
    if len(table.ratios) > 1:
        shown = ", ".join(f"{ratio:g}" for ratio in table.ratios)
        raise ValueError(
            f"{table.source} has keep ratios {shown}: IsoFLOP parabolas are of one model family, "
            "choose one with --only-keep-ratio"
        )
    if width is not None and not width > 1:
        raise ValueError(f"--parabola-width is {width:g}: give a factor above 1")
    budgets = table.budgets(tolerance)
    if len(budgets) < 2:
        raise ValueError(
            f"{table.source} has one FLOP budget ({table.flops_R[0]:.3g}): IsoFLOP power laws need "
            "at least two"
        )
    parabolas, used, left_out = [], [], []
    for budget_M in budgets:
        rows_M = budget_M if width is None else _near_best(table, budget_M, width)
        flops = float(np.exp(np.log(table.flops_R[rows_M]).mean()))
        sizes = len(np.unique(table.params_R[rows_M]))
        if sizes < 3:
            left_out.append(f"{flops:.3g} FLOPs: a parabola needs 3 sizes, there are {sizes}")
            continue
        parabola = fit_parabola(table, rows_M, table.loss_R[rows_M])
        parabolas.append(parabola)
        if parabola.minimum == "none":
            left_out.append(f"{flops:.3g} FLOPs: the parabola has no minimum")
        elif parabola.minimum == "outside" and not allow_outside:
            left_out.append(
                f"{flops:.3g} FLOPs: the minimum, at {parabola.params:.3g} parameters, is outside "
                "the sizes tried"
            )
        else:
            used.append(parabola)
    if len(used) < 2:
        raise ValueError(
            f"{table.source} has {len(used)} FLOP budgets with a minimum inside their sizes, 2 are "
            f"needed ({'; '.join(left_out)}): add sizes, or widen --budget-tolerance"
        )
    params, tokens = power_laws(used)
    return IsoFlopFit(tuple(parabolas), tuple(used), tuple(left_out), params, tokens)


def fit_parabola(table: Table, rows_M: IntArray, loss_M: FloatArray) -> Parabola:
    """Fits the parabola of one budget.

    Args:
        table: the runs.
        rows_M: the budget's rows, of at least three different sizes.
        loss_M: losses to fit, those of the rows or a resample.
    """
    log_params_M = np.log(table.params_R[rows_M])
    log_tokens_M = np.log(table.tokens_R[rows_M])
    center = float(log_params_M.mean())
    x_M = log_params_M - center
    c2, c1, c0 = (float(value) for value in np.polyfit(x_M, loss_M, 2))
    residual_M = loss_M - (c0 + c1 * x_M + c2 * x_M * x_M)
    minimum: MinimumKind = "none"
    params = tokens = loss = float("nan")
    if c2 > 0:
        x = -c1 / (2 * c2)
        minimum = "inside" if x_M.min() <= x <= x_M.max() else "outside"
        slope, level = np.polyfit(x_M, log_tokens_M, 1)
        with np.errstate(over="ignore"):
            params, tokens = float(np.exp(center + x)), float(np.exp(level + slope * x))
        loss = c0 - c1 * c1 / (4 * c2)
    return Parabola(
        flops=float(np.exp(np.log(table.flops_R[rows_M]).mean())),
        rows_M=rows_M,
        center=center,
        coefficients=(c0, c1, c2),
        minimum=minimum,
        params=params,
        tokens=tokens,
        loss=loss,
        residual_M=residual_M,
    )


def power_laws(parabolas: Sequence[Parabola]) -> tuple[PowerLaw, PowerLaw]:
    """Fits N_opt and D_opt over C by least squares of logarithms, from at least two budgets."""
    log_flops = np.log([parabola.flops for parabola in parabolas])
    center = log_flops.mean()
    laws = []
    for values in ([p.params for p in parabolas], [p.tokens for p in parabolas]):
        exponent, level = np.polyfit(log_flops - center, np.log(values), 1)
        laws.append(PowerLaw(float(level - exponent * center), float(exponent)))
    return laws[0], laws[1]


def _near_best(table: Table, rows_M: IntArray, width: float) -> IntArray:
    """Returns the rows whose size is within a factor of the size of least loss."""
    log_params_M = np.log(table.params_R[rows_M])
    best = log_params_M[np.argmin(table.loss_R[rows_M])]
    return rows_M[np.abs(log_params_M - best) <= math.log(width) * (1 + 1e-9)]
