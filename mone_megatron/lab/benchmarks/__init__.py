"""What things cost, as ratios within one run; the command line is ``tools/bench.py``.

Nothing of the package imports this one.
"""
