"""Fit scaling laws to runs: coefficients with intervals, held-out error, optima, plots."""

import sys

from mone_megatron.commands.scaling_law import main

if __name__ == "__main__":
    sys.exit(main())
