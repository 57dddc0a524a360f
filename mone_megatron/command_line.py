"""Holds what all command lines share: how they end, and how they say how far they are.

Imports nothing that takes time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from mone_megatron.os_errors import explained


def exit_status(
    tool: str, run: Callable[[argparse.Namespace], None], options: argparse.Namespace
) -> int:
    """Runs a tool and returns its exit status.

    Args:
        tool: its name, which begins each line about what went wrong.
        run: the tool; a ValueError or OSError of it is for the user.
        options: what ``run`` is called with.

    Returns:
        0; 2 for what cannot be done, with a line on standard error for each reason; 130 for Ctrl-C.
    """
    try:
        run(options)
    except (ValueError, OSError) as error:
        for line in told(error).splitlines():
            print(f"{tool}: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{tool}: interrupted", file=sys.stderr)
        return 130
    return 0


def told(error: ValueError | OSError) -> str:
    """Returns what went wrong, in words: a line for each reason."""
    if isinstance(error, OSError) and type(error).__str__ is OSError.__str__:
        return explained(error)
    return str(error)


def say(message: str) -> None:
    """Tells the user how far it is, apart from the results."""
    print(message, file=sys.stderr, flush=True)


def once(tell: Callable[[str], None]) -> Callable[[str], None]:
    """Returns a ``tell`` that says each message the first time only."""
    said: set[str] = set()

    def tell_once(message: str) -> None:
        if message not in said:
            said.add(message)
            tell(message)

    return tell_once


def check_at_least_1(options: argparse.Namespace, *names: str) -> None:
    """Checks the options of these names that are given.

    Raises:
        ValueError: when one is smaller; the message names it.
    """
    for name in names:
        value = vars(options)[name]
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')}: {value} is too small; use 1 or more")
