"""Turns text into the .bin/.idx files that data.source=indexed reads."""

import sys

from mone_megatron.commands.preprocess_data import main

if __name__ == "__main__":
    sys.exit(main())
