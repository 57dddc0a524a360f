"""Holds what all command lines share: how they end, and how they say how far they are.

Imports nothing that takes time.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from mone_megatron.os_errors import explained

USAGE_EXIT_CODE = 2
INTERRUPTED_EXIT_CODE = 130


class Parser(argparse.ArgumentParser):
    """Says what is wrong with an option in one line, as everything else that is wrong is said."""

    def error(self, message: str) -> NoReturn:
        """Ends the process with exit status 2."""
        print_error(f"{message.removeprefix('argument ')}; see {self.prog} --help")
        self.exit(USAGE_EXIT_CODE)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Refuses an empty argument, which is a variable of the shell that is not set.

        As a folder it would be the one that the shell is in.
        """
        given = sys.argv[1:] if args is None else list(args)
        for before, text in zip(["", *given], given, strict=False):
            option, equals, value = text.partition("=")
            if not text:
                named = before if before.startswith("--") and "=" not in before else "an argument"
                self.error(f"{named}: is empty; is a variable of the shell not set?")
            if option.startswith("--") and equals and not value:
                self.error(f"{option}: is empty; is a variable of the shell not set?")
        return super().parse_known_args(given, namespace)


def exit_status(
    run: Callable[[argparse.Namespace], int | None],
    options: argparse.Namespace,
    *,
    interrupted: str = "interrupted",
) -> int:
    """Runs a tool and returns its exit status.

    Args:
        run: the tool; a ValueError or OSError of it is for the user. It returns its exit status,
            None for 0.
        options: what ``run`` is called with.
        interrupted: what is said of Ctrl-C.

    Returns:
        The status of ``run``; 2 for what cannot be done, with a line on standard error for each
        reason; 130 for Ctrl-C.
    """
    try:
        return run(options) or 0
    except (ValueError, OSError) as error:
        print_error(told(error))
        return USAGE_EXIT_CODE
    except KeyboardInterrupt:
        print_error(interrupted)
        return INTERRUPTED_EXIT_CODE


def interrupted(what: str) -> int:
    """Says what Ctrl-C ended, and returns the exit status.

    Another one, which a launcher sends beside the terminal's, changes nothing any more.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print_error(what)
    return INTERRUPTED_EXIT_CODE


def print_error(what: str) -> None:
    """Prints on standard error what went wrong, each line of it as ``error: ...``."""
    for line in what.splitlines() or [what]:
        print(f"error: {line}", file=sys.stderr, flush=True)


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


def seed(text: str) -> int:
    """Returns the number that an argument of a seed gives.

    Raises:
        argparse.ArgumentTypeError: it is not one that every generator takes.
    """
    number = int(text) if text.isascii() and text.isdigit() else -1
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {2**32 - 1}")
    return number


def check_at_least_1(options: argparse.Namespace, *names: str) -> None:
    """Checks the options of these names that are given.

    Raises:
        ValueError: when one is smaller; the message names it.
    """
    for name in names:
        value = vars(options)[name]
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')}: {value} is too small; use 1 or more")
