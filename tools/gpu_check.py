"""What a first GPU is asked: kernels, steps, speed, resuming, each in a process with a limit."""

import sys

from mone_megatron.commands.gpu_check import main

if __name__ == "__main__":
    sys.exit(main())
