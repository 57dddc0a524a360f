"""Before a run: does it fit, how long does it take, what does it cost; without GPU or torch."""

import sys

from mone_megatron.commands.plan import main

if __name__ == "__main__":
    sys.exit(main())
