"""Tells which coefficients of a fitted law the table determines, and what rests on the others.

Legend: R rows (runs), P coefficients (5, or 6 with gamma).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mone_megatron.lab.scaling_law.bootstrap import Bounds
from mone_megatron.lab.scaling_law.fit import Fit
from mone_megatron.lab.scaling_law.isoflop import Parabola
from mone_megatron.lab.scaling_law.table import Table
from mone_megatron.report.identified import (
    Doubt,
    DoubtKind,
    few_samples,
    holds_zero,
    missing_samples,
    wide_interval,
)
from mone_megatron.report.stats import FloatArray

# A term, or a change, below this share of every loss is an error to the fit (its delta's default).
_NOTHING = 1e-3
# Coefficients that have at least this share in a flat direction are named with it.
_NAMED_SHARE = 0.3
# Standard error, along a direction of log heights and exponents, beyond which it is flat: a factor
# of e in a height, 1 in an exponent.
_LARGEST_ERROR = 1.0
# A curve in one variable passes through fewer different values, whatever its form.
_VALUES_FOR_A_CURVE = 4
_RATIOS_FOR_A_CURVE = 3
_SIZES_FOR_A_PARABOLA = 4
# Points beyond the number of coefficients that say something of the scatter.
_SPARE_POINTS = 3
# A share between 0 and 1 whose interval is wider than this is known to be somewhere.
_WIDE_SHARE = 0.5
# Kinds of doubts about a coefficient that reach what is computed from it. A height whose interval
# is wide is not among them: heights and exponents move together, and the optimum may stand still.
_REACHES_FURTHER: tuple[DoubtKind, ...] = ("bound", "flat", "zero", "few", "missing")

_TERMS = {"A": "alpha", "B": "beta"}
_TERM_OF = {"A": "A / N^alpha", "B": "B / D^beta"}


def coefficient_doubts(fit: Fit, table: Table) -> dict[str, list[Doubt]]:
    """Returns what the fit itself says against each coefficient, without resamples.

    Looked for are terms that are nothing in every run, exponents at 0, directions in which the
    coefficients can move together without a change of any loss, and too few different sizes, token
    counts, keep ratios or points.

    Args:
        fit: the fit of `table`.
        table: the runs.
    """
    doubts: dict[str, list[Doubt]] = {name: [] for name in fit.law.coefficients}
    jacobian_RP = log_loss_jacobian(fit, table)
    _at_bounds(fit, jacobian_RP, doubts)
    _flat_directions(fit, table, jacobian_RP, doubts)
    _too_few(fit, table, doubts)
    return doubts


def log_loss_jacobian(fit: Fit, table: Table) -> FloatArray:
    """Returns ``[R, P]``, how the logarithm of each fitted loss moves with each coefficient.

    Columns in the order of the law's coefficients: the logarithms of E, of the heights of the two
    other terms at the mean of the table, and the exponents (of the keep ratio: gamma alpha).
    """
    law = fit.law
    log_params_R = np.log(table.params_R) - np.log(table.params_R).mean()
    log_tokens_R = np.log(table.tokens_R) - np.log(table.tokens_R).mean()
    loss_R = law.loss(table.params_R, table.tokens_R, table.ratio_R)
    tokens_R = law.B * table.tokens_R**-law.beta / loss_R
    floor_R = law.E / loss_R
    params_R = 1 - tokens_R - floor_R
    columns = [floor_R, params_R, -params_R * log_params_R, tokens_R, -tokens_R * log_tokens_R]
    if law.gamma is not None:
        assert table.ratio_R is not None
        log_ratio_R = np.log(table.ratio_R)
        columns.append(-params_R * (log_ratio_R - log_ratio_R.mean()))
    return np.stack(columns, axis=1)


def _at_bounds(fit: Fit, jacobian_RP: FloatArray, doubts: dict[str, list[Doubt]]) -> None:
    names = list(doubts)
    share_P = np.abs(jacobian_RP).max(axis=0)
    if share_P[names.index("E")] < _NOTHING:
        doubts["E"].append(
            Doubt("bound", f"it is at its bound 0: less than {_NOTHING:.1%} of every loss")
        )
    for height, exponent in _TERMS.items():
        if share_P[names.index(height)] < _NOTHING:
            reason = f"{_TERM_OF[height]} is less than {_NOTHING:.1%} of every loss"
            doubts[height].append(Doubt("bound", f"it is at its bound 0: {reason}"))
            doubts[exponent].append(Doubt("flat", f"any value fits: {reason}"))
            if height == "A" and "gamma" in doubts:
                doubts["gamma"].append(Doubt("flat", f"any value fits: {reason}"))
            continue
        value = fit.law.coefficients[exponent]
        if abs(value) * share_P[names.index(exponent)] < _NOTHING or value <= 0:
            doubts[exponent].append(
                Doubt("bound", f"it is at or below its bound 0: {_TERM_OF[height]} falls by less "
                      f"than {_NOTHING:.1%} of the loss over the table")
            )  # fmt: skip


def _flat_directions(
    fit: Fit, table: Table, jacobian_RP: FloatArray, doubts: dict[str, list[Doubt]]
) -> None:
    names = list(doubts)
    rows, count = jacobian_RP.shape
    # Columns that are nothing are said to be so above; they would make a direction of their own.
    kept = [
        index
        for index, name in enumerate(names)
        if not any(doubt.kind in ("bound", "flat") for doubt in doubts[name])
    ]
    if len(kept) < 2:
        return
    _, singular, directions = np.linalg.svd(jacobian_RP[:, kept], full_matrices=False)
    fitted_R = fit.law.loss(table.params_R, table.tokens_R, table.ratio_R)
    absolute = float(np.abs(np.log(table.loss_R / fitted_R)).sum())
    # Of a normal error, from the mean size: the fit nearly is one of absolute errors.
    scatter = 1.2533 * absolute / max(rows - count, 1)
    for value, direction in zip(singular, directions, strict=True):
        change = float(value) / np.sqrt(rows)
        error = scatter / float(value) if value > 0 else np.inf
        if change >= _NOTHING and error <= _LARGEST_ERROR:
            continue
        moved = [names[kept[i]] for i in np.flatnonzero(np.abs(direction) >= _NAMED_SHARE)]
        why = (
            f"a step along it (a factor of e in a height, 1 in an exponent) moves the losses by "
            f"{change:.2g}"
            if change < _NOTHING
            else f"the scatter of the runs leaves it open by {error:.2g}"
        )
        for name in moved:
            others = [other for other in moved if other != name]
            partly = f" with {', '.join(others)}" if others else ""
            doubts[name].append(Doubt("flat", f"it lies in a flat direction{partly}: {why}"))


def _too_few(fit: Fit, table: Table, doubts: dict[str, list[Doubt]]) -> None:
    by_value: list[tuple[Sequence[str], FloatArray | None, int, str]] = [
        (("A", "alpha"), table.params_R, _VALUES_FOR_A_CURVE, "size"),
        (("B", "beta"), table.tokens_R, _VALUES_FOR_A_CURVE, "token count"),
        (("gamma",), table.ratio_R, _RATIOS_FOR_A_CURVE, "keep ratio"),
    ]
    for names, values_R, enough, what in by_value:
        if values_R is None:
            continue
        for name in names:
            if name in doubts:
                doubts[name] += few_samples(len(np.unique(values_R)), enough, what, f"{what}s")
    spare = int(table.points().max()) + 1 - len(fit.law.coefficients)
    for name in doubts:
        doubts[name] += few_samples(
            spare, _SPARE_POINTS, "point more than coefficients", "points more than coefficients"
        )


def parabola_doubts(table: Table, parabola: Parabola) -> list[Doubt]:
    """Returns what is to be said against the minimum of one budget's parabola.

    Args:
        table: the runs.
        parabola: one that has a minimum.
    """
    sizes = len(np.unique(table.params_R[parabola.rows_M]))
    doubts = few_samples(sizes, _SIZES_FOR_A_PARABOLA, "size", "sizes")
    if parabola.minimum == "outside":
        doubts.append(Doubt("bound", "it is outside the sizes that were tried"))
    return doubts


def interval_doubts(name: str, interval: Bounds | None) -> list[Doubt]:
    """Returns what the bootstrap interval of a number says against it.

    Args:
        name: a coefficient, an exponent ``a`` or ``b`` of the optimum, or anything positive.
        interval: None when there is none.
    """
    if interval is None:
        return []
    low, high = interval.low, interval.high
    if name in ("alpha", "beta"):
        return holds_zero(low, high)
    if name == "gamma":
        if low <= 0 and high >= 1:
            return [Doubt("wide", "its interval holds both 0 (free) and 1 (a model is its kept "
                          "neurons)")]  # fmt: skip
        return []
    if name in ("a", "b"):
        if high - low > _WIDE_SHARE:
            return [Doubt("wide", f"its interval is {high - low:.2f} wide, of a share from 0 to 1")]
        return []
    return wide_interval(low, high)


def sample_doubts(samples: Sequence[float] | FloatArray, confidence: float) -> list[Doubt]:
    """Returns a doubt when too many resamples have no such number."""
    values = np.asarray(samples, np.float64)
    return missing_samples(int(np.isfinite(values).sum()), len(values), confidence)


def doubted(doubts: dict[str, list[Doubt]], names: Sequence[str]) -> list[str]:
    """Returns those of `names` whose doubts reach what is computed from them."""
    return [
        name
        for name in names
        if any(
            doubt.kind in _REACHES_FURTHER or (doubt.kind == "wide" and name not in _TERMS)
            for doubt in doubts.get(name, [])
        )
    ]
