"""Convert a checkpoint of any layout to a Hugging Face folder, on a CPU, one shard at a time."""

import sys

from mone_megatron.commands.export_hf import main

if __name__ == "__main__":
    sys.exit(main())
