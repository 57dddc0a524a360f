"""Benchmarks measure what things cost, as ratios within one run, for ``tools/bench.py``.

Nothing of the package imports this one.
"""
