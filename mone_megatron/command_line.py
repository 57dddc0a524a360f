"""What all command lines share: how they end, and how they say how far they are.

Imports nothing that takes time.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable


def exit_status(
    tool: str, run: Callable[[argparse.Namespace], None], options: argparse.Namespace
) -> int:
    """Runs a tool and returns its exit status.

    Args:
        tool: its name, which begins each line about what went wrong.
        run: the tool; a ValueError or OSError of it is for the user.
        options: given to ``run``.

    Returns:
        0; 2 for what cannot be done, with a line on standard error for each reason; 130 for Ctrl-C.
    """
    print_anything()
    try:
        run(options)
    except (ValueError, OSError) as error:
        for line in str(error).splitlines():
            print(f"{tool}: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{tool}: interrupted", file=sys.stderr)
        return 130
    return 0


def print_anything() -> None:
    """Makes results that standard output cannot spell be printed with escapes.

    A path that is not UTF-8, or a sign such as ± where the locale is C, would otherwise end a tool
    after all its work, when it prints.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


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
        ValueError: naming the one that is smaller.
    """
    for name in names:
        value = vars(options)[name]
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')}: {value} is too small; use 1 or more")
