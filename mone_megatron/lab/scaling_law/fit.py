"""Fits the law's coefficients: log-Huber loss, log-sum-exp form, L-BFGS from many starts.

Minimised is the sum over runs of Huber_delta(log L_predicted - log L), with

    log L_predicted = logsumexp(e, a - alpha (n - n0) - g (p - p0), b - beta (d - d0))

where n, d and p are the logarithms of N, D and r, and n0, d0, p0 their means over the table. So
E = exp(e) > 0, A = exp(a + alpha n0 + g p0) > 0, B likewise, gamma = g / alpha. Taking the terms
about their means leaves the optimum where it is and frees the height of a term from its exponent:
without it L-BFGS stops long before A and B have moved (FLAME-MoE's published A and B are two of
its starting values, exp(5) and exp(15)).

Legend: R rows (runs), P coefficients (5, or 6 with gamma), S starts.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from tqdm import tqdm

from mone_megatron.lab.scaling_law.law import Law
from mone_megatron.lab.scaling_law.table import Table
from mone_megatron.report.stats import FloatArray

DEFAULT_DELTA = 1e-3

# The starts of Chinchilla's fit, which FLAME-MoE's took over: 5 * 6 * 5 * 6 * 5 = 4,500.
_START_LOG_E = (-1.0, -0.5, 0.0, 0.5, 1.0)
_START_LOG_A = _START_LOG_B = (0.0, 5.0, 10.0, 15.0, 20.0, 25.0)
_START_EXPONENT = (0.0, 0.5, 1.0, 1.5, 2.0)
ALL_STARTS = 4500
# Taken in turn, so that the term does not multiply the number of starts.
_START_G = (0.0, 0.25, 0.5)

# exp of it is a float.
_LARGEST_LOG = 709.0

# Ends within this share of the best objective count as the same end.
_SAME_OBJECTIVE = 1e-3
# Optima kept to start refits of resampled tables from.
_MAX_SEEDS = 3
# Share of the variance of one logarithm that the others must leave unexplained.
_LEAST_FREE_VARIANCE = 1e-4


@dataclass(frozen=True)
class Fit:
    """Holds a fitted law.

    Attributes:
        law: the coefficients of the least objective found.
        objective: the sum of Huber terms over delta^2.
        delta: where the Huber loss turns from quadratic to linear.
        starts: starting points tried.
        at_best: how many of them ended within 0.1% of the best objective (and 1e-6).
        seeds_SP: the best optimum and up to two other local ones, in coordinates that only
            :func:`refit` reads.
    """

    law: Law
    objective: float
    delta: float
    starts: int
    at_best: int
    seeds_SP: FloatArray


class Objective:
    """Computes the scaled objective of a table and its gradient at one point of coefficients."""

    def __init__(self, table: Table, delta: float, *, neuron_term: bool) -> None:
        if not 0 < delta < math.inf:
            raise ValueError(f"delta is {delta:g}: give a positive number, usually 1e-3")
        self.neuron_term = neuron_term
        self.log_params, self.log_tokens = np.log(table.params_R), np.log(table.tokens_R)
        self.log_params_mean = float(self.log_params.mean())
        self.log_tokens_mean = float(self.log_tokens.mean())
        self._loss_R = np.log(table.loss_R)
        self._delta = delta
        # Keeps the objective of order one for the stopping rules, for any delta.
        self._scale = 1 / (delta * min(delta, DEFAULT_DELTA))
        self._params_R = self.log_params - self.log_params_mean
        self._tokens_R = self.log_tokens - self.log_tokens_mean
        if neuron_term:
            assert table.ratio_R is not None
            log_ratio_R = np.log(table.ratio_R)
        else:
            log_ratio_R = np.zeros(len(table))
        self.log_ratio_mean = float(log_ratio_R.mean())
        self._ratio_R = log_ratio_R - self.log_ratio_mean
        self._terms_3R = np.empty((3, len(table)))

    def __call__(self, theta_P: FloatArray) -> tuple[float, FloatArray]:
        """Returns objective and gradient ``[P]`` at (e, a, alpha, b, beta[, g])."""
        terms_3R = self._terms_3R
        terms_3R[0] = theta_P[0]
        np.multiply(self._params_R, -theta_P[2], out=terms_3R[1])
        terms_3R[1] += theta_P[1]
        np.multiply(self._tokens_R, -theta_P[4], out=terms_3R[2])
        terms_3R[2] += theta_P[3]
        if self.neuron_term:
            terms_3R[1] -= theta_P[5] * self._ratio_R
        top_R = terms_3R.max(axis=0)
        weights_3R = np.exp(terms_3R - top_R)
        sum_R = weights_3R.sum(axis=0)
        residual_R = top_R + np.log(sum_R) - self._loss_R
        clipped_R = np.minimum(np.maximum(residual_R, -self._delta), self._delta)
        value = float(clipped_R @ residual_R - 0.5 * (clipped_R @ clipped_R))
        weights_3R *= self._scale * clipped_R / sum_R
        gradient = [
            weights_3R[0].sum(),
            weights_3R[1].sum(),
            -(weights_3R[1] @ self._params_R),
            weights_3R[2].sum(),
            -(weights_3R[2] @ self._tokens_R),
        ]
        if self.neuron_term:
            gradient.append(-(weights_3R[1] @ self._ratio_R))
        return self._scale * value, np.array(gradient)

    def law(self, theta_P: FloatArray) -> Law:
        """Returns the law at a point; A or B is infinite when too large for a float."""
        e, a, alpha, b, beta = (float(value) for value in theta_P[:5])
        g = float(theta_P[5]) if self.neuron_term else 0.0
        return Law(
            E=_exp(e),
            A=_exp(a + alpha * self.log_params_mean + g * self.log_ratio_mean),
            alpha=alpha,
            B=_exp(b + beta * self.log_tokens_mean),
            beta=beta,
            gamma=(g / alpha if alpha else math.nan) if self.neuron_term else None,
        )

    def from_means_of(self, origin: Objective, points_SP: FloatArray) -> FloatArray:
        """Returns another table's points as points of the same laws here, ``[S, P]``."""
        moved_SP = points_SP.copy()
        for height, exponent, here, there in (
            (1, 2, self.log_params_mean, origin.log_params_mean),
            (3, 4, self.log_tokens_mean, origin.log_tokens_mean),
        ):
            moved_SP[:, height] -= points_SP[:, exponent] * (here - there)
        if self.neuron_term:
            moved_SP[:, 1] -= points_SP[:, 5] * (self.log_ratio_mean - origin.log_ratio_mean)
        return moved_SP

    def starts(self, count: int, seed: int) -> FloatArray:
        """Returns ``[S, P]`` starting points.

        They are the whole grid, or `count` of it drawn without repetition.

        Raises:
            ValueError: `count` is not from 1 to 4,500.
        """
        if not 1 <= count <= ALL_STARTS:
            raise ValueError(f"starts is {count}: give 1 to {ALL_STARTS}")
        grid = np.array(
            list(
                itertools.product(
                    _START_LOG_E, _START_LOG_A, _START_EXPONENT, _START_LOG_B, _START_EXPONENT
                )
            )
        )
        if self.neuron_term:
            turns = np.resize(np.array(_START_G), len(grid))
            grid = np.concatenate([grid, turns[:, None]], axis=1)
        grid[:, 1] -= grid[:, 2] * self.log_params_mean
        grid[:, 3] -= grid[:, 4] * self.log_tokens_mean
        if self.neuron_term:
            grid[:, 1] -= grid[:, 5] * self.log_ratio_mean
        if count == len(grid):
            return grid
        chosen = np.random.default_rng(seed).choice(len(grid), count, replace=False)
        return grid[np.sort(chosen)]


def fit_law(
    table: Table,
    *,
    delta: float = DEFAULT_DELTA,
    neuron_term: bool = False,
    starts: int = ALL_STARTS,
    seed: int = 0,
    progress: str = "",
) -> Fit:
    """Fits the law to a table.

    Args:
        table: the runs.
        delta: where the Huber loss of the log loss turns from quadratic to linear.
        neuron_term: fit gamma too; the table needs keep ratios.
        starts: how many of the 4,500 starting points to try.
        seed: draws them when not all are tried.
        progress: title of a progress line on stderr; "" for none.

    Raises:
        ValueError: the table cannot determine the coefficients, or an option is out of range.
    """
    check_identifiable(table, neuron_term=neuron_term)
    objective = Objective(table, delta, neuron_term=neuron_term)
    starts_SP = objective.starts(starts, seed)
    ends = [
        _descend(objective, start_P)
        for start_P in tqdm(
            starts_SP, desc=progress, unit="start", disable=not progress, mininterval=1.0
        )
    ]
    return _best(objective, delta, ends)


def refit(fit: Fit, table: Table, *, about: Table) -> Law:
    """Fits a table that resembles the one of `fit`, from that fit's optima.

    Args:
        fit: the fit of `about`.
        table: for example a resample of `about`.
        about: the table that `fit` was fitted to.
    """
    neuron_term = fit.law.gamma is not None
    origin = Objective(about, fit.delta, neuron_term=neuron_term)
    objective = Objective(table, fit.delta, neuron_term=neuron_term)
    seeds_SP = objective.from_means_of(origin, fit.seeds_SP)
    ends = [_descend(objective, seed_P) for seed_P in seeds_SP]
    return objective.law(min(ends, key=lambda end: end[0])[1])


def check_identifiable(table: Table, *, neuron_term: bool) -> None:
    """Refuses tables that cannot determine the coefficients.

    Raises:
        ValueError: says what there is too little of.
    """
    count = 6 if neuron_term else 5
    if neuron_term and table.ratio_R is None:
        raise ValueError(
            f"{table.source} has no keep ratios, which the activated-neuron term needs: "
            "give a 'keep_ratio' column or --active-column"
        )
    distinct = int(table.points().max()) + 1
    if distinct <= count:
        raise ValueError(
            f"{table.source} has {distinct} different points, too few for {count} coefficients: "
            f"at least {count + 1} different (params, tokens) are needed"
        )
    needs = [("params", table.params_R, 3), ("tokens", table.tokens_R, 3)]
    if neuron_term and table.ratio_R is not None:
        needs.append(("keep ratios", table.ratio_R, 2))
    for name, values, least in needs:
        found = len(np.unique(values))
        if found < least:
            raise ValueError(
                f"{table.source} has {found} different {name}: at least {least} are needed"
            )
    log_params, log_tokens = np.log(table.params_R), np.log(table.tokens_R)
    if _free_variance(log_tokens, [log_params]) < _LEAST_FREE_VARIANCE:
        raise ValueError(
            f"{table.source}: tokens follow params in every row (one FLOP budget, or one ratio of "
            "tokens to params), so their effects cannot be told apart: vary tokens at equal params"
        )
    if neuron_term:
        assert table.ratio_R is not None
        log_ratio = np.log(table.ratio_R)
        if _free_variance(log_ratio, [log_params, log_tokens]) < _LEAST_FREE_VARIANCE:
            raise ValueError(
                f"{table.source}: the keep ratio follows params and tokens in every row, so its "
                "effect cannot be told apart: vary it at equal params and tokens"
            )


def _free_variance(target_R: FloatArray, others: list[FloatArray]) -> float:
    """Returns the share of the target's variance that a linear function of the others leaves."""
    design = np.stack([np.ones_like(target_R), *others], axis=1)
    solution = np.linalg.lstsq(design, target_R, rcond=None)[0]
    return float((target_R - design @ solution).var() / target_R.var())


def _exp(power: float) -> float:
    return math.exp(power) if power < _LARGEST_LOG else math.inf


def _descend(objective: Objective, start_P: FloatArray) -> tuple[float, FloatArray]:
    """Returns objective and coefficients where L-BFGS ends.

    The objective is infinity where it does not end in numbers.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        result = minimize(
            objective,
            start_P,
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": 2000, "maxfun": 4000, "maxcor": 20, "ftol": 1e-13, "gtol": 1e-8},
        )
    value = float(result.fun)
    return (value if math.isfinite(value) else math.inf), np.asarray(result.x, np.float64)


def _best(objective: Objective, delta: float, ends: list[tuple[float, FloatArray]]) -> Fit:
    ends = sorted(ends, key=lambda end: end[0])
    # Once more from the best end, where the memory of L-BFGS starts afresh.
    ends[0] = min(ends[0], _descend(objective, ends[0][1]), key=lambda end: end[0])
    best = ends[0][0]
    if not math.isfinite(best):
        raise ValueError("no start led to a fit: the values of the table are too extreme")
    law = objective.law(ends[0][1])
    if not law.finite:
        raise ValueError(
            f"the best fit has alpha {law.alpha:.3g} and beta {law.beta:.3g}, which is no law: "
            "the losses of the table hardly depend on params or tokens"
        )
    near = best * (1 + _SAME_OBJECTIVE) + 1e-6
    seeds = [ends[0]]
    for value, theta_P in ends:
        if len(seeds) == _MAX_SEEDS or not math.isfinite(value):
            break
        if value > seeds[-1][0] * (1 + _SAME_OBJECTIVE) + 1e-6:
            seeds.append((value, theta_P))
    return Fit(
        law=law,
        objective=best,
        delta=delta,
        starts=len(ends),
        at_best=sum(value <= near for value, _ in ends),
        seeds_SP=np.stack([theta_P for _, theta_P in seeds]),
    )
