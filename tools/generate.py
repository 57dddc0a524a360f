"""Continue a prompt with a run of ours, an export, or any transformers model."""

import sys

from mone_megatron.commands.generate import main

if __name__ == "__main__":
    sys.exit(main())
