"""One scaling study: the fits that were asked for, their intervals, errors and predictions."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from mone_megatron.analysis.scaling_law.bootstrap import (
    bootstrap_isoflop,
    bounds,
    check_resamples,
)
from mone_megatron.analysis.scaling_law.isoflop import fit_isoflop
from mone_megatron.analysis.scaling_law.parametric import study_parametric
from mone_megatron.analysis.scaling_law.results import (
    AllocationEstimate,
    Estimate,
    IsoFlop,
    Options,
    Study,
)
from mone_megatron.analysis.scaling_law.table import Table, listed


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
        parametric = study_parametric(table, options, warnings)
    if "isoflop" in options.methods:
        isoflop = study_isoflop(table, options, warnings)
    return Study(table, options, parametric, isoflop, tuple(warnings))


def study_isoflop(table: Table, options: Options, warnings: list[str]) -> IsoFlop:
    """Fit the parabolas and everything that follows from them.

    Args:
        table: the runs.
        options: what to do.
        warnings: what a reader must know is appended.

    Raises:
        ValueError: fewer than two budgets have a minimum, or rows of several keep ratios.
    """
    fit = fit_isoflop(
        table,
        tolerance=options.budget_tolerance,
        width=options.parabola_width,
        allow_outside=options.allow_outside,
    )
    warnings.extend(f"IsoFLOP leaves out {reason}" for reason in fit.left_out)
    samples = None
    if options.resamples:
        samples = bootstrap_isoflop(fit, table, resamples=options.resamples, seed=options.seed)
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
