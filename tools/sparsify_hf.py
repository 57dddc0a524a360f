"""Prune the neurons of trained models, token by token, and measure what that costs."""

import sys

from mone_megatron.commands.sparsify_hf import main

if __name__ == "__main__":
    sys.exit(main())
