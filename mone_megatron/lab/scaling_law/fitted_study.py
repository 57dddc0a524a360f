"""Makes a scaling study: the fits that were asked for, their intervals, errors and predictions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from mone_megatron.lab.scaling_law.bootstrap import (
    bootstrap_isoflop,
    bounds,
    check_resamples,
)
from mone_megatron.lab.scaling_law.identification import interval_doubts, parabola_doubts
from mone_megatron.lab.scaling_law.isoflop import fit_isoflop
from mone_megatron.lab.scaling_law.parametric import study_parametric
from mone_megatron.lab.scaling_law.results import (
    AllocationEstimate,
    Estimate,
    IsoFlop,
    Options,
    Study,
)
from mone_megatron.lab.scaling_law.table import Table, listed
from mone_megatron.report.identified import (
    NOT_IDENTIFIED,
    Doubt,
    few_samples,
    missing_samples,
    rests_on,
)


def run_study(table: Table, options: Options) -> Study:
    """Makes the fits of `options` and returns what was found.

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
    study = Study(table, options, parametric, isoflop, tuple(warnings))
    unknown = [name for name, one in study.estimates.items() if not one.identified]
    if unknown:
        told = f"{NOT_IDENTIFIED} (the reasons are below): {', '.join(unknown)}"
        study = replace(study, warnings=(*study.warnings, told))
    return study


def study_isoflop(table: Table, options: Options, warnings: list[str]) -> IsoFlop:
    """Fits the parabolas and everything that follows from them.

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
    total = options.resamples if samples is not None else 0

    def estimate(
        name: str, value: float, resampled: Iterable[float], doubts: Sequence[Doubt]
    ) -> Estimate:
        found = [one for one in resampled if math.isfinite(one)]
        interval = bounds(found, options.confidence)
        own = missing_samples(len(found), total, options.confidence)
        return Estimate(value, interval, (*doubts, *own, *interval_doubts(name, interval)))

    of_minima = [parabola_doubts(table, parabola) for parabola in fit.used]
    # Power laws go through the minima: too few of them, or one that is none, reach the optima.
    unknown = [
        f"the minimum of {parabola.flops:.3g} FLOPs"
        for parabola, doubts in zip(fit.used, of_minima, strict=True)
        if doubts
    ]
    of_laws = [
        *few_samples(len(fit.used), 3, "budget with a minimum", "budgets with a minimum"),
        *rests_on(unknown),
    ]

    allocations = tuple(
        AllocationEstimate(
            "isoflop",
            flops,
            estimate("params", fit.params.at(flops), (one.at(flops) for one, _ in laws), of_laws),
            estimate("tokens", fit.tokens.at(flops), (one.at(flops) for _, one in laws), of_laws),
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
            (parabola, estimate("params", parabola.params, resampled, doubts))
            for parabola, resampled, doubts in zip(fit.used, minima, of_minima, strict=True)
        ),
        exponents={
            "a": estimate("a", fit.params.exponent, (one.exponent for one, _ in laws), of_laws),
            "b": estimate("b", fit.tokens.exponent, (one.exponent for _, one in laws), of_laws),
        },
        allocations=allocations,
    )
