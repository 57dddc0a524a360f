"""Scaling laws from a table of runs: docs/scaling-laws.md says what is fitted and how.

``table`` and ``run_table`` read the points, ``law`` is the formula, ``fit`` finds its
coefficients, ``isoflop`` fits parabolas, ``bootstrap`` and ``holdout`` say how far to trust either,
``study`` does all of it, ``output`` and ``figures`` write it.
"""
