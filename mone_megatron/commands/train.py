"""Trains (``mone train``) in one process, or in ``--processes`` of them as torchrun would."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mone_megatron import pretrain
from mone_megatron.command_line import USAGE_EXIT_CODE, print_error, told
from mone_megatron.config.errors import ConfigError
from mone_megatron.config.load import compose, typed_values
from mone_megatron.config.validate import validate
from mone_megatron.counting import counted
from mone_megatron.launcher import launch

_PROCESSES = "--processes"


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains and returns the exit status of the run."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        processes, rest = _taken(given)
        if processes is None:
            return pretrain.main(rest)
        if not any(argument.startswith("-") for argument in rest):
            # Before torch is imported, and once instead of by every process.
            validate(
                compose(rest),
                world_size=processes,
                local_world_size=processes,
                written=typed_values(rest),
            )
    except ConfigError as error:
        print_error(told(error))
        return USAGE_EXIT_CODE
    print(f"starting {counted(processes, 'process')}", flush=True)
    command = ["--standalone", "--nproc-per-node", str(processes), "-m", "mone_megatron.pretrain"]
    return launch([*command, *rest])


def _taken(arguments: Sequence[str]) -> tuple[int | None, list[str]]:
    """Returns the number after ``--processes``, None without it, and the other arguments.

    Raises:
        ConfigError: it is no number of processes.
    """
    rest: list[str] = []
    number: str | None = None
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name == _PROCESSES:
            number = value if equals else next(words, "")
        else:
            rest.append(word)
    if number is None:
        return None, rest
    if not number.isdecimal() or int(number) == 0:
        raise ConfigError([f"{_PROCESSES}: {number!r} is no number of processes; use 1 or more"])
    return int(number), rest
