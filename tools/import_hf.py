"""Convert a Hugging Face model to a checkpoint that any layout starts from."""

import sys

from mone_megatron.commands.import_hf import main

if __name__ == "__main__":
    sys.exit(main())
