"""Makes the import of large packages quicker, and lets Ctrl-C end it."""

from __future__ import annotations

import gc
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def first_import_of(package: str) -> Iterator[None]:
    """Imports within it take a sixth less processor time, where ``package`` was not imported yet.

    What torch, megatron-core and transformers make while they are imported stays, and yet Python
    looks through all of it for garbage again and again. Within this it does not look, and what was
    made by the end is left out of its later searches. Nothing is changed where the package is
    there already, so that the garbage of an earlier run in the same process is found.

    Ctrl-C within it raises KeyboardInterrupt, also where a package takes that for one of the errors
    that it goes on after.

    Args:
        package: the first large package that is imported within it.
    """
    waits = package not in sys.modules and gc.isenabled()
    if waits:
        gc.disable()
    try:
        with _interrupts_are_heard():
            yield
    finally:
        if waits:
            gc.freeze()
            gc.enable()


@contextmanager
def _interrupts_are_heard() -> Iterator[None]:
    """Raises KeyboardInterrupt at the end where Ctrl-C was swallowed within.

    Nothing is changed where the user, or another thread than the main one, handles the signal.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    heard = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal heard
        heard = True
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except Exception as error:
        # What is missing after an import that was cut short is no news.
        if heard:
            raise KeyboardInterrupt from error
        raise
    finally:
        if signal.getsignal(signal.SIGINT) is interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    if heard:
        raise KeyboardInterrupt
