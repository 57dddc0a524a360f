"""Computes held-out errors: predictions of runs that the law was not fitted to.

Legend: R rows (runs) held out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from mone_megatron.lab.scaling_law.fit import fit_law
from mone_megatron.lab.scaling_law.law import Law
from mone_megatron.lab.scaling_law.table import IntArray, Table
from mone_megatron.report.stats import FloatArray

# A fold is one of many fits; this many of the 4,500 starts reach the optimum many times over.
FOLD_STARTS = 200


@dataclass(frozen=True)
class Errors:
    """Holds predicted beside measured losses.

    Attributes:
        rows_R: rows of the table.
        predicted_R: losses that the law predicts.
        measured_R: losses of the runs.
    """

    rows_R: IntArray
    predicted_R: FloatArray
    measured_R: FloatArray

    @property
    def relative_R(self) -> FloatArray:
        """Returns predicted over measured losses, less 1."""
        return self.predicted_R / self.measured_R - 1

    @property
    def mean_absolute(self) -> float:
        """Returns the mean size of the relative error."""
        return float(np.abs(self.relative_R).mean())

    @property
    def largest(self) -> float:
        """Returns the largest size of the relative error."""
        return float(np.abs(self.relative_R).max())

    @property
    def bias(self) -> float:
        """Returns the mean relative error: positive when the law predicts too much."""
        return float(self.relative_R.mean())


def errors_of(law: Law, table: Table, rows_R: IntArray) -> Errors:
    """Returns the errors of a law on some rows."""
    part = table.take(rows_R)
    return Errors(rows_R, law.loss(part.params_R, part.tokens_R, part.ratio_R), part.loss_R)


def largest_budgets(
    table: Table,
    count: int,
    tolerance: float,
    *,
    delta: float,
    neuron_term: bool,
    starts: int,
    seed: int = 0,
) -> Errors:
    """Fits without the `count` largest FLOP budgets and predicts their runs.

    Raises:
        ValueError: what is left cannot determine the coefficients, or there are not that many
            budgets.
    """
    budgets = table.budgets(tolerance)
    if not 1 <= count < len(budgets):
        raise ValueError(
            f"{table.source} has {len(budgets)} FLOP budgets: hold out 1 to {len(budgets) - 1}"
        )
    held = np.sort(np.concatenate(budgets[-count:]))
    return _predict(table, held, delta, neuron_term, starts, seed)


def k_fold(
    table: Table,
    folds: int,
    *,
    delta: float,
    neuron_term: bool,
    starts: int,
    seed: int = 0,
    progress: str = "",
) -> Errors:
    """Predicts every run from a fit without its fold.

    Points are dealt at random; replicates of a point stay together, so that no prediction has seen
    its own point.

    Args:
        table: the runs.
        folds: at least 2, at most the number of different points.
        delta: where the Huber loss turns from quadratic to linear.
        neuron_term: fit gamma too.
        starts: starting points of each fit.
        seed: of the deal and the starts.
        progress: title of a progress line on stderr; "" for none.

    Raises:
        ValueError: the rest of a fold cannot determine the coefficients.
    """
    points_R = table.points()
    distinct = int(points_R.max()) + 1
    if not 2 <= folds <= distinct:
        raise ValueError(
            f"{table.source} has {distinct} different points: give 2 to {distinct} folds, or 0"
        )
    fold_of_point = np.empty(distinct, np.int64)
    fold_of_point[np.random.default_rng(seed).permutation(distinct)] = np.arange(distinct) % folds
    fold_R = fold_of_point[points_R]
    predicted_R = np.empty(len(table))
    for fold in tqdm(
        range(folds), desc=progress, unit="fold", disable=not progress, mininterval=1.0
    ):
        held = np.flatnonzero(fold_R == fold)
        predicted_R[held] = _predict(table, held, delta, neuron_term, starts, seed).predicted_R
    return Errors(np.arange(len(table)), predicted_R, table.loss_R)


def _predict(
    table: Table, held: IntArray, delta: float, neuron_term: bool, starts: int, seed: int
) -> Errors:
    rest = table.take(np.setdiff1d(np.arange(len(table)), held))
    fit = fit_law(rest, delta=delta, neuron_term=neuron_term, starts=starts, seed=seed)
    return errors_of(fit.law, table, held)
