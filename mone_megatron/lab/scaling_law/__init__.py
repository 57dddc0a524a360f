"""Fits scaling laws to a table of runs: docs/scaling-laws.md says what is fitted and how.

``table`` and ``run_table`` read the points, ``law`` is the formula, ``fit`` finds its
coefficients, ``isoflop`` fits parabolas, ``bootstrap`` and ``holdout`` say how far to trust either,
``parametric`` and ``fitted_study`` put it together into ``results``, ``fit_files`` and ``figures``
write it.
"""
