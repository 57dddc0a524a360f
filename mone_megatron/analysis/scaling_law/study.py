"""One scaling study: the fits that were asked for, their intervals, errors and predictions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mone_megatron.analysis.scaling_law.bootstrap import (
    DEFAULT_RESAMPLES,
    Bounds,
    IsoFlopSamples,
    Kind,
    LawSamples,
    bootstrap_isoflop,
    bootstrap_law,
    bounds,
    check_resamples,
)
from mone_megatron.analysis.scaling_law.fit import (
    ALL_STARTS,
    DEFAULT_DELTA,
    Fit,
    fit_law,
)
from mone_megatron.analysis.scaling_law.holdout import (
    FOLD_STARTS,
    Errors,
    errors_of,
    k_fold,
    largest_budgets,
)
from mone_megatron.analysis.scaling_law.isoflop import (
    DEFAULT_TOLERANCE,
    IsoFlopFit,
    Parabola,
    fit_isoflop,
)
from mone_megatron.analysis.scaling_law.law import Law
from mone_megatron.analysis.scaling_law.table import FLOPS_PER_PARAM_TOKEN, Table, listed

Method = Literal["parametric", "isoflop"]
METHODS: tuple[Method, ...] = ("parametric", "isoflop")

# Below this share of starts at the best optimum another one may not have been found.
_FEW_STARTS = 0.005
# FLOPs over N*D that differ by more between rows are told.
_UNEVEN_FLOPS = 1.1


@dataclass(frozen=True)
class Request:
    """A point whose loss is asked for."""

    params: float
    tokens: float
    ratio: float = 1.0


@dataclass(frozen=True)
class Options:
    """What to do with a table; the defaults are those of the command.

    Attributes:
        methods: fits to make.
        delta: of the Huber loss of the log loss.
        neuron_term: fit the activated-neuron term.
        starts: starting points of the parametric fit, at most 4,500.
        seed: of starts, folds and resamples.
        resamples: of the bootstrap; 0 gives no intervals.
        bootstrap_kind: what is resampled.
        confidence: of the intervals.
        holdout_budgets: largest FLOP budgets to hold out; 0 for none.
        folds: of the cross-validation; 0 for none.
        budget_tolerance: relative width of one FLOP budget.
        parabola_width: take only sizes within this factor of a budget's best; None takes all.
        allow_outside: take parabolas' minima outside the sizes of their budget.
        allow_mismatch: fit although the table says that its rows are not comparable.
        budgets: FLOP budgets to allocate.
        keep_ratio: of the models to allocate them to.
        flops_per_param_token: FLOPs over N*D of those models; None takes the table's median.
        requests: points to predict.
        progress: show progress lines.
    """

    methods: tuple[Method, ...] = ("parametric",)
    delta: float = DEFAULT_DELTA
    neuron_term: bool = False
    starts: int = ALL_STARTS
    seed: int = 0
    resamples: int = DEFAULT_RESAMPLES
    bootstrap_kind: Kind = "residuals"
    confidence: float = 0.95
    holdout_budgets: int = 1
    folds: int = 5
    budget_tolerance: float = DEFAULT_TOLERANCE
    parabola_width: float | None = None
    allow_outside: bool = False
    allow_mismatch: bool = False
    budgets: tuple[float, ...] = ()
    keep_ratio: float = 1.0
    flops_per_param_token: float | None = None
    requests: tuple[Request, ...] = ()
    progress: bool = False


@dataclass(frozen=True)
class Estimate:
    """A value and its interval; None without one."""

    value: float
    interval: Bounds | None


@dataclass(frozen=True)
class AllocationEstimate:
    """Where a budget is best spent, by one method."""

    method: Method
    flops: float
    params: Estimate
    tokens: Estimate
    # None for IsoFLOP, which says where the least loss is and not how large.
    loss: Estimate | None
    # FLOPs over the largest of the table: above 1 the answer is extrapolated.
    reach: float


@dataclass(frozen=True)
class Prediction:
    """The loss of a requested point; `reach` is the larger of its N and D over the table's."""

    request: Request
    loss: Estimate
    reach: float


@dataclass(frozen=True)
class Parametric:
    """Results of the parametric fit; a text in place of errors says why there are none."""

    fit: Fit
    samples: LawSamples | None
    coefficients: dict[str, Estimate]
    # Exponents of N_opt and D_opt over C; None when the law has no optimum.
    exponents: dict[str, Estimate] | None
    in_sample: Errors
    holdout: Errors | str | None
    folds: Errors | str | None
    flops_per_param_token: float
    allocations: tuple[AllocationEstimate, ...]
    predictions: tuple[Prediction, ...]


@dataclass(frozen=True)
class IsoFlop:
    """Results of the parabolas."""

    fit: IsoFlopFit
    samples: IsoFlopSamples | None
    # N at the minimum of each used parabola.
    minima: tuple[tuple[Parabola, Estimate], ...]
    exponents: dict[str, Estimate]
    allocations: tuple[AllocationEstimate, ...]


@dataclass(frozen=True)
class Study:
    """Everything found; `warnings` are what a reader must know before believing it."""

    table: Table
    options: Options
    parametric: Parametric | None
    isoflop: IsoFlop | None
    warnings: tuple[str, ...]


def run_study(table: Table, options: Options) -> Study:
    """Make the fits of `options`.

    Raises:
        ValueError: the rows are not comparable, the table cannot determine a fit, or an option is
            out of range; one line.
    """
    check_resamples(options.resamples)
    if not 0 < options.confidence < 1:
        raise ValueError(f"--confidence is {options.confidence:g}: give a share such as 0.95")
    if not 0 < options.keep_ratio <= 1:
        raise ValueError(f"--keep-ratio is {options.keep_ratio:g}: give a share of neurons, 0 to 1")
    if not options.budget_tolerance >= 0:
        raise ValueError(f"--budget-tolerance is {options.budget_tolerance:g}: give 0 or more")
    mismatches = list(table.mismatches)
    if len(table.ratios) > 1 and not options.neuron_term:
        shown = ", ".join(f"{ratio:g}" for ratio in table.ratios)
        mismatches.append(
            f"keep ratios: {shown} (fit them with --neuron-term or choose with --only-keep-ratio)"
        )
    if mismatches and not options.allow_mismatch:
        raise ValueError(
            f"{table.source}: the runs are not comparable: {listed(mismatches, '; ')}; "
            "--allow-mismatch fits them all the same"
        )
    warnings = [f"NOT COMPARABLE, {mismatch}" for mismatch in mismatches]
    parametric = isoflop = None
    if "parametric" in options.methods:
        parametric = _parametric(table, options, warnings)
    if "isoflop" in options.methods:
        isoflop = _isoflop(table, options, warnings)
    return Study(table, options, parametric, isoflop, tuple(warnings))


def _parametric(table: Table, options: Options, warnings: list[str]) -> Parametric:
    per_param_token = _flops_per_param_token(table, options, warnings)
    fit = fit_law(
        table,
        delta=options.delta,
        neuron_term=options.neuron_term,
        starts=options.starts,
        seed=options.seed,
        progress="fit" if options.progress else "",
    )
    if fit.at_best < max(2, _FEW_STARTS * fit.starts):
        warnings.append(
            f"{fit.at_best} of {fit.starts} starts ended at the best optimum: "
            "there may be a better one, try more with --starts"
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
        if samples.redrawn:
            warnings.append(
                f"{samples.redrawn} draws of rows could not determine the coefficients and were "
                f"repeated, for {options.resamples} resamples: --bootstrap-kind residuals has none"
            )
    law = fit.law

    def estimate(value: Callable[[Law], float]) -> Estimate:
        found = None
        if samples is not None:
            found = bounds([value(one) for one in samples.laws], options.confidence)
        return Estimate(value(law), found)

    def optimal(value: Callable[[Law], float]) -> Callable[[Law], float]:
        return lambda one: value(one) if one.has_optimum else math.nan

    if not law.has_optimum:
        warnings.append(
            f"alpha is {law.alpha:.4g} and beta {law.beta:.4g}: the table does not show that both "
            "size and tokens help, so there is no compute optimum"
        )
    elif samples is not None:
        without = sum(not one.has_optimum for one in samples.laws)
        if without:
            warnings.append(
                f"{without} of {len(samples.laws)} resamples have no compute optimum (alpha or "
                "beta is not positive); intervals of optima leave them out"
            )
    allocations, exponents = [], None
    if law.has_optimum:
        exponents = {
            "a": estimate(optimal(lambda one: one.params_exponent)),
            "b": estimate(optimal(lambda one: one.tokens_exponent)),
        }
        for flops in options.budgets:
            params, tokens, loss = (
                estimate(optimal(_part_of_optimum(flops, per_param_token, options.keep_ratio, of)))
                for of in ("params", "tokens", "loss")
            )
            reach = flops / float(table.flops_R.max())
            allocations.append(AllocationEstimate("parametric", flops, params, tokens, loss, reach))
    starts = min(options.starts, FOLD_STARTS)
    return Parametric(
        fit=fit,
        samples=samples,
        coefficients={name: estimate(_coefficient(name)) for name in law.coefficients},
        exponents=exponents,
        in_sample=errors_of(law, table, np.arange(len(table))),
        holdout=_errors_or_reason(
            lambda: largest_budgets(
                table,
                options.holdout_budgets,
                options.budget_tolerance,
                delta=options.delta,
                neuron_term=options.neuron_term,
                starts=starts,
                seed=options.seed,
            )
        )
        if options.holdout_budgets
        else None,
        folds=_errors_or_reason(
            lambda: k_fold(
                table,
                options.folds,
                delta=options.delta,
                neuron_term=options.neuron_term,
                starts=starts,
                seed=options.seed,
                progress="folds" if options.progress else "",
            )
        )
        if options.folds
        else None,
        flops_per_param_token=per_param_token,
        allocations=tuple(allocations),
        predictions=tuple(
            Prediction(
                request,
                estimate(_loss_of(request)),
                max(
                    request.params / float(table.params_R.max()),
                    request.tokens / float(table.tokens_R.max()),
                ),
            )
            for request in options.requests
        ),
    )


def _isoflop(table: Table, options: Options, warnings: list[str]) -> IsoFlop:
    fit = fit_isoflop(
        table,
        tolerance=options.budget_tolerance,
        width=options.parabola_width,
        allow_outside=options.allow_outside,
    )
    warnings.extend(f"IsoFLOP leaves out {reason}" for reason in fit.left_out)
    samples = None
    if options.resamples:
        samples = bootstrap_isoflop(
            fit,
            table,
            kind=options.bootstrap_kind,
            resamples=options.resamples,
            seed=options.seed,
        )
        if samples is None:
            warnings.append(
                "IsoFLOP has no intervals: each budget has three runs, so no parabola has an error"
            )
        elif samples.missing:
            warnings.append(
                f"{samples.missing} parabolas of {options.resamples} resamples have no minimum; "
                "intervals leave them out"
            )

    laws = samples.laws if samples is not None else ()

    def estimate(value: float, resampled: Iterable[float]) -> Estimate:
        return Estimate(value, bounds(list(resampled), options.confidence))

    allocations = tuple(
        AllocationEstimate(
            "isoflop",
            flops,
            estimate(fit.params.at(flops), (params.at(flops) for params, _ in laws)),
            estimate(fit.tokens.at(flops), (tokens.at(flops) for _, tokens in laws)),
            None,
            flops / float(table.flops_R.max()),
        )
        for flops in options.budgets
    )
    minima = samples.minima if samples is not None else (np.empty(0),) * len(fit.used)
    return IsoFlop(
        fit=fit,
        samples=samples,
        minima=tuple(
            (parabola, estimate(parabola.params, resampled))
            for parabola, resampled in zip(fit.used, minima, strict=True)
        ),
        exponents={
            "a": estimate(fit.params.exponent, (params.exponent for params, _ in laws)),
            "b": estimate(fit.tokens.exponent, (tokens.exponent for _, tokens in laws)),
        },
        allocations=allocations,
    )


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


def _coefficient(name: str) -> Callable[[Law], float]:
    return lambda law: law.coefficients[name]


def _part_of_optimum(
    flops: float, per_param_token: float, ratio: float, part: str
) -> Callable[[Law], float]:
    def read(law: Law) -> float:
        best = law.optimum(flops, per_param_token, ratio)
        return {"params": best.params, "tokens": best.tokens, "loss": best.loss}[part]

    return read


def _loss_of(request: Request) -> Callable[[Law], float]:
    point = np.array(request.params), np.array(request.tokens), np.array(request.ratio)
    return lambda law: float(law.loss(*point))


def _errors_or_reason(measure: Callable[[], Errors]) -> Errors | str:
    """The errors, or why these rows do not allow them; the fit itself stands without."""
    try:
        return measure()
    except ValueError as error:
        return str(error)
