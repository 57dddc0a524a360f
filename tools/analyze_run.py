"""See which experts and neurons tokens use: of runs, checkpoints, exports, any MoE, or traces."""

import sys

from mone_megatron.commands.analyze_run import main

if __name__ == "__main__":
    sys.exit(main())
