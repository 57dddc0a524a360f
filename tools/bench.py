"""Benchmarks as ratios within one run: layers, selection, ties, steps, decoding, trainer, saves."""

import sys

from mone_megatron.commands.bench import main

if __name__ == "__main__":
    sys.exit(main())
