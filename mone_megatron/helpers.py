"""Tells the failure of a thread or process to the one that started it, in one line.

A thread that raises prints a traceback and is gone; a process that is killed says nothing; and who
waits for either waits for ever. So every thread of a run is a :class:`HelperThread`, every start is
inside :func:`starting`, every end of a process is told by :func:`ending`, and a process that waits
for work ends with the one that gives it (:func:`end_with_parent`). Imports nothing that takes time.
"""

from __future__ import annotations

import errno
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# What a start fails of, and what helps.
_FIXES = {
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "the machine has no more open files to give",
    errno.EAGAIN: "raise the limit of processes and threads (ulimit -u)",
    errno.ENOMEM: "the machine has no memory left",
    errno.ENOSPC: "make room in /dev/shm",
}
_NO_THREADS = "can't start new thread"


class HelperError(OSError):
    """Says, in one line, that a thread or process failed, or could not be started."""


def one_line(error: BaseException) -> str:
    """Returns the type and message of an error, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")


def ending(exit_code: int) -> str:
    """Returns how a process ended, for the middle of a sentence.

    Args:
        exit_code: of ``multiprocessing`` and ``subprocess``: negative for a signal.
    """
    if exit_code >= 0:
        return f"ended with code {exit_code}"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    memory = ", which a machine that runs out of memory sends" if name == "SIGKILL" else ""
    return f"was killed by {name}{memory}"


@contextmanager
def starting(what: str, otherwise: str = "") -> Iterator[None]:
    """Turns what keeps a thread or process from starting into one line.

    Args:
        what: what is started, such as ``2 data loader processes (data.num_workers)``.
        otherwise: how to do without it; "" for no such way.

    Raises:
        HelperError: when it cannot be started; the message says what, why and the fix.
    """
    try:
        yield
    except HelperError:
        raise
    except OSError as error:
        why, number = error.strerror or " ".join(str(error).split()), error.errno
    except RuntimeError as error:
        if _NO_THREADS not in str(error):
            raise
        why, number = _NO_THREADS, errno.EAGAIN
    else:
        return
    if "AF_UNIX path too long" in why:
        fix = f"TMPDIR={os.environ.get('TMPDIR', '')} is too long for a socket; set a shorter one"
    else:
        fix = _FIXES.get(number or 0, "")
    raise HelperError("; ".join(filter(None, (f"cannot start {what}: {why}", fix, otherwise))))


class HelperThread(threading.Thread):
    """Is a daemon thread whose failure is told, in one line, to the one that started it."""

    def __init__(
        self,
        target: Callable[[], object],
        *,
        name: str,
        on_failure: Callable[[str], None] | None = None,
    ) -> None:
        """Prepares the thread; :meth:`start` starts it.

        Args:
            target: the function that the thread calls.
            name: the thread's name, for people.
            on_failure: is told, in that thread, why it ended before its time; None prints it.
        """
        super().__init__(name=name, daemon=True)
        self._work = target
        self._on_failure = on_failure or _print_failure

    def start(self) -> None:
        """Starts it.

        Raises:
            HelperError: when the system has no more threads.
        """
        with starting(f"the thread {self.name!r}"):
            super().start()

    def run(self) -> None:
        """Works until the end, or until an error, which is told."""
        try:
            self._work()
        # A SystemExit would end the thread without a word.
        except BaseException as error:
            self._on_failure(f"the thread {self.name!r} has failed: {one_line(error)}")


def _print_failure(why: str) -> None:
    print(f"error: {why}", file=sys.stderr, flush=True)


def end_with_parent() -> None:
    """Lets this process end as soon as the one that started it has ended, however that did.

    For a process of :mod:`multiprocessing` that waits for work: it holds both ends of the pipe that
    work comes by, and so would wait for ever.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    HelperThread(watch, name="parent").start()


@contextmanager
def unwinding_on_sigterm() -> Iterator[None]:
    """Makes SIGTERM end this process like an exception does, so that it ends what it started.

    By itself the signal ends a process between two instructions, and its processes and temporary
    files stay. Does nothing outside the main thread, which cannot take signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _raise_exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _raise_exit(number: int, frame: FrameType | None) -> None:
    # Once: a second one must not interrupt the ending.
    signal.signal(number, signal.SIG_IGN)
    raise SystemExit(128 + number)
