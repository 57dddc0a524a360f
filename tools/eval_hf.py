"""Evaluate models on tasks and corpora: runs, exports, or any model in the transformers format."""

import sys

from mone_megatron.commands.eval_hf import main

if __name__ == "__main__":
    sys.exit(main())
