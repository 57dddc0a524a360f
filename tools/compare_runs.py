"""Compare training runs: a table on the terminal, comparison.png, comparison.html and .json."""

import sys

from mone_megatron.commands.compare_runs import main

if __name__ == "__main__":
    sys.exit(main())
