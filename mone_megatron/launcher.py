"""Starts the processes of a run by torchrun, and ends as the run does.

    python -m mone_megatron.launcher [torchrun's options] -m mone_megatron.pretrain experiment=NAME

torchrun ends an interrupted or failed run with a traceback and an exit code of its own; here the
last lines and the exit code are the run's.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from mone_megatron.command_line import (
    INTERRUPTED_EXIT_CODE,
    USAGE_EXIT_CODE,
    interrupted,
    print_error,
)
from mone_megatron.helpers import ending
from mone_megatron.rendezvous_errors import why_not_met

_ELASTIC = "torch.distributed.elastic"


def launch(arguments: Sequence[str]) -> int:
    """Starts processes and waits for their end.

    Args:
        arguments: torchrun's.

    Returns:
        The exit code of the process that failed first, 128 + number where a signal ended it; 130
        for Ctrl-C and SIGTERM, 2 for a port that cannot be had, and 0 when all ended well.
    """
    try:
        return _launch(arguments)
    except KeyboardInterrupt:
        # Later it is a SignalException.
        return interrupted("interrupted before a process was started")


def _launch(arguments: Sequence[str]) -> int:
    # As torchrun sets it, after a warning.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from torch.distributed import DistNetworkError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    _hush()
    try:
        torchrun([*arguments])
    except SignalException:
        return INTERRUPTED_EXIT_CODE
    except DistNetworkError as error:
        print_error(why_not_met(error))
        return USAGE_EXIT_CODE
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return int(failure.exitcode)
        # It could not say so itself.
        print_error(f"rank {rank} {ending(failure.exitcode)}")
        return 128 - int(failure.exitcode)
    return 0


def _hush() -> None:
    """Keeps torchrun from telling which process got which signal: the run says why it ended."""
    for name in list(logging.root.manager.loggerDict):
        if name == _ELASTIC or name.startswith(f"{_ELASTIC}."):
            # Each has a level of its own.
            logging.getLogger(name).setLevel(logging.CRITICAL)


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
