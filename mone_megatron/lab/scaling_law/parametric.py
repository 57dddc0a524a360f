"""Makes the parametric fit of a study, with its intervals, errors, optima and predictions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from mone_megatron.lab.scaling_law.bootstrap import LawSamples, bootstrap_law, bounds
from mone_megatron.lab.scaling_law.fit import Fit, fit_law
from mone_megatron.lab.scaling_law.holdout import (
    FOLD_STARTS,
    Errors,
    errors_of,
    k_fold,
    largest_budgets,
)
from mone_megatron.lab.scaling_law.identification import (
    coefficient_doubts,
    doubted,
    interval_doubts,
    sample_doubts,
)
from mone_megatron.lab.scaling_law.law import Law
from mone_megatron.lab.scaling_law.results import (
    AllocationEstimate,
    Estimate,
    Options,
    Parametric,
    Prediction,
    Request,
)
from mone_megatron.lab.scaling_law.table import FLOPS_PER_PARAM_TOKEN, Table
from mone_megatron.report.identified import Doubt, rests_on

# Below this share of starts at the best optimum another one may not have been found.
_FEW_STARTS = 0.005
# FLOPs over N*D that differ by more between rows are told.
_UNEVEN_FLOPS = 1.1

# Any figure of a law; NaN where the law has none.
Figure = Callable[[Law], float]


def study_parametric(table: Table, options: Options, warnings: list[str]) -> Parametric:
    """Fits the law and everything that follows from it.

    Args:
        table: the runs.
        options: what to do.
        warnings: what a reader must know is appended.

    Raises:
        ValueError: the table cannot determine the law, or an option is out of range.
    """
    per_param_token = _flops_per_param_token(table, options, warnings)
    fit = fit_law(
        table,
        delta=options.delta,
        neuron_term=options.neuron_term,
        starts=options.starts,
        seed=options.seed,
        progress="fit" if options.progress else "",
    )
    samples = None
    if options.resamples:
        samples = bootstrap_law(
            fit,
            table,
            kind=options.bootstrap_kind,
            resamples=options.resamples,
            seed=options.seed,
            progress="bootstrap" if options.progress else "",
        )
    warnings.extend(_doubts(fit, samples))
    law = fit.law

    def estimate(name: str, figure: Figure, doubts: Sequence[Doubt]) -> Estimate:
        resampled = [figure(one) for one in samples.laws] if samples is not None else []
        interval = bounds(resampled, options.confidence)
        own = sample_doubts(resampled, options.confidence) + interval_doubts(name, interval)
        return Estimate(figure(law), interval, (*doubts, *own))

    of_the_fit = coefficient_doubts(fit, table)
    coefficients = {
        name: estimate(name, _coefficient(name), of_the_fit[name]) for name in law.coefficients
    }
    # What moves an optimum: at keep ratio 1 gamma does not enter.
    entering = [name for name in coefficients if name != "gamma" or options.keep_ratio < 1]
    optimum = rests_on(
        doubted({name: list(one.doubts) for name, one in coefficients.items()}, entering)
    )

    def best(flops: float, part: str) -> Estimate:
        figure = _best(flops, per_param_token, options.keep_ratio, part)
        return estimate(part, figure, optimum)

    def predicted(request: Request) -> Prediction:
        # Among the runs the losses themselves hold a prediction, whatever its coefficients are.
        reach = _reach(request, table)
        doubts = optimum if reach > 1 + 1e-9 else []
        return Prediction(request, estimate("loss", _loss_of(request), doubts), reach)

    holdout, folds = _held_out(table, options)
    return Parametric(
        fit=fit,
        samples=samples,
        coefficients=coefficients,
        exponents={
            "a": estimate("a", _optimal(lambda one: one.params_exponent), optimum),
            "b": estimate("b", _optimal(lambda one: one.tokens_exponent), optimum),
        }
        if law.has_optimum
        else None,
        in_sample=errors_of(law, table, np.arange(len(table))),
        holdout=holdout,
        folds=folds,
        flops_per_param_token=per_param_token,
        allocations=tuple(
            AllocationEstimate(
                method="parametric",
                flops=flops,
                params=best(flops, "params"),
                tokens=best(flops, "tokens"),
                loss=best(flops, "loss"),
                reach=flops / float(table.flops_R.max()),
            )
            for flops in options.budgets
            if law.has_optimum
        ),
        predictions=tuple(predicted(request) for request in options.requests),
    )


def _doubts(fit: Fit, samples: LawSamples | None) -> list[str]:
    """Returns why the fit or its intervals may be less than they look."""
    doubts = []
    if fit.at_best < max(2, _FEW_STARTS * fit.starts):
        doubts.append(
            f"{fit.at_best} of {fit.starts} starts ended at the best optimum: "
            "there may be a better one, try more with --starts"
        )
    if not fit.law.has_optimum:
        doubts.append(
            f"alpha is {fit.law.alpha:.4g} and beta {fit.law.beta:.4g}: the table does not show "
            "that both size and tokens help, so no budget has an optimum"
        )
    if samples is None:
        return doubts
    if samples.redrawn:
        doubts.append(
            f"{samples.redrawn} draws of rows could not determine the coefficients and were "
            f"repeated, for {len(samples.laws)} resamples: --bootstrap-kind normal needs none"
        )
    broken = sum(not one.finite for one in samples.laws)
    without = sum(one.finite and not one.has_optimum for one in samples.laws)
    if broken:
        doubts.append(
            f"{broken} of {len(samples.laws)} resamples led to no law (coefficients that are no "
            "numbers); intervals leave them out"
        )
    if without:
        doubts.append(
            f"{without} of {len(samples.laws)} resamples have no compute optimum (alpha or beta "
            "is not positive); intervals of optima leave them out"
        )
    return doubts


def _held_out(table: Table, options: Options) -> tuple[Errors | str | None, Errors | str | None]:
    """Returns the errors on the largest budgets and on folds.

    They are None where not wanted, or a text that says why there are none: the fit itself stands
    without them.
    """
    starts = min(options.starts, FOLD_STARTS)
    holdout: Errors | str | None = None
    folds: Errors | str | None = None
    if options.holdout_budgets:
        try:
            holdout = largest_budgets(
                table,
                options.holdout_budgets,
                options.budget_tolerance,
                delta=options.delta,
                neuron_term=options.neuron_term,
                starts=starts,
                seed=options.seed,
            )
        except ValueError as error:
            holdout = str(error)
    if options.folds:
        try:
            folds = k_fold(
                table,
                options.folds,
                delta=options.delta,
                neuron_term=options.neuron_term,
                starts=starts,
                seed=options.seed,
                progress="folds" if options.progress else "",
            )
        except ValueError as error:
            folds = str(error)
    return holdout, folds


def _flops_per_param_token(table: Table, options: Options, warnings: list[str]) -> float:
    if options.flops_per_param_token is not None:
        if not 0 < options.flops_per_param_token < math.inf:
            raise ValueError(
                f"--flops-per-param-token is {options.flops_per_param_token:g}: give a positive "
                f"number, usually {FLOPS_PER_PARAM_TOKEN:g}"
            )
        return options.flops_per_param_token
    rows = np.arange(len(table))
    if options.neuron_term and table.ratio_R is not None:
        # What a token costs depends on the share of neurons it keeps.
        rows = np.flatnonzero(np.isclose(table.ratio_R, options.keep_ratio, rtol=1e-6))
        if not len(rows):
            if options.budgets:
                raise ValueError(
                    f"{table.source} has no row of keep ratio {options.keep_ratio:g}, so the cost "
                    "of such a model is unknown: give --flops-per-param-token or --keep-ratio"
                )
            return FLOPS_PER_PARAM_TOKEN
    cost = table.flops_R[rows] / (table.params_R[rows] * table.tokens_R[rows])
    if options.budgets and cost.max() > _UNEVEN_FLOPS * cost.min():
        warnings.append(
            f"FLOPs are {cost.min():.3g} to {cost.max():.3g} N D; the parametric fit allocates "
            f"budgets with the median, {np.median(cost):.3g}"
        )
    return float(np.median(cost))


def _coefficient(name: str) -> Figure:
    return lambda law: law.coefficients[name]


def _optimal(figure: Figure) -> Figure:
    return lambda law: figure(law) if law.has_optimum else math.nan


def _best(flops: float, per_param_token: float, ratio: float, part: str) -> Figure:
    """Returns what gives N, D or the loss at the optimum of a budget under a law."""

    def figure(law: Law) -> float:
        best = law.optimum(flops, per_param_token, ratio)
        return {"params": best.params, "tokens": best.tokens, "loss": best.loss}[part]

    return _optimal(figure)


def _loss_of(request: Request) -> Figure:
    point = np.array(request.params), np.array(request.tokens), np.array(request.ratio)
    return lambda law: float(law.loss(*point))


def _reach(request: Request, table: Table) -> float:
    return max(
        request.params / float(table.params_R.max()), request.tokens / float(table.tokens_R.max())
    )
