"""Train variants over seeds, and say with intervals what differs."""

import sys

from mone_megatron.commands.study import main

if __name__ == "__main__":
    sys.exit(main())
