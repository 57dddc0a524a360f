"""Serve a run or an export with vLLM's OpenAI server."""

import sys

from mone_megatron.commands.serve import main

if __name__ == "__main__":
    sys.exit(main())
