"""Scaling laws from a table of runs: docs/scaling-laws.md says what is fitted and how.

``table`` and ``run_table`` read the points, ``law`` is the formula, ``fit`` finds its
coefficients, ``isoflop`` fits parabolas, ``bootstrap`` and ``holdout`` say how far to trust either,
``parametric`` and ``study`` put it together into ``results``, ``output`` and ``figures`` write it.
"""
