"""Stopping on request: the step in progress is finished, then every rank stops together.

Two kinds of request. "Stop" (SIGINT, SIGTERM) is someone who wants the run to end; "requeue"
(SIGUSR1, which schedulers send before a time limit, and ``train.exit_after_minutes``) is a run that
should go on later. Both save; the exit code tells them apart (docs/reliability.md).

A terminal that is closed (SIGHUP) only takes away who reads: a run goes on without. Under a
launcher it is "stop", since torchrun passes it on and kills what has not ended half a minute later.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from types import FrameType

import torch

from mone_megatron.helpers import HelperThread
from mone_megatron.parallel.device import numbers_on

# Exit code of a run that was asked to stop (128 + SIGINT), its files complete up to that step.
INTERRUPTED_EXIT_CODE = 130
# Exit code of a run that ran out of time and wants to be started again (EX_TEMPFAIL of sysexits.h).
RESUME_EXIT_CODE = 75
# Exit code of a run in which a rank hung or was lost (mone_megatron.train.health.watchdog).
HANG_EXIT_CODE = 76

TIME_LIMIT = "train.exit_after_minutes"
_STOP = (signal.SIGINT, signal.SIGTERM)
_REQUEUE = (signal.SIGUSR1,)
# Signals that a run takes for itself: its children leave them to it.
REQUESTS = (*_STOP, *_REQUEUE, signal.SIGHUP)
# A terminal sends Ctrl-C to every process, and torchrun passes its own on: one request, not two.
_SAME_REQUEST_SECONDS = 2.0
_STOP_WATCHING = 0


def _leave_signals_to_parent() -> None:
    """Keeps the signals of a forked child (loader, checkpoint writer) from the run."""
    descriptor = signal.set_wakeup_fd(-1)
    if descriptor != -1 and descriptor not in _watched:
        signal.set_wakeup_fd(descriptor)


# Wakeup descriptors of this module, inherited by forked children.
_watched: set[int] = set()
os.register_at_fork(after_in_child=_leave_signals_to_parent)


class StopRequest:
    """Remembers a request until the end of the step; one made 2 s later or more ends at once.

    Python runs signal handlers between bytecodes of the main thread, which may sit in a collective
    for minutes. So a thread watches the signals as they come in: a second one also ends a process
    that hangs.
    """

    def __init__(
        self,
        *,
        exit_after_minutes: float = 0.0,
        started: float | None = None,
        launched: bool = False,
    ) -> None:
        """Starts with nothing asked for.

        Args:
            exit_after_minutes: when to ask by itself; 0 for never.
            started: when the run began, of ``time.monotonic()``; None for now.
            launched: by something that ends its processes itself when a terminal is closed.
        """
        self._stop = (*_STOP, signal.SIGHUP) if launched else _STOP
        self.signal_name: str | None = None
        self._number: int | None = None
        self._failure: str | None = None
        began = time.monotonic() if started is None else started
        self._deadline = began + 60.0 * exit_after_minutes if exit_after_minutes else None

    def __enter__(self) -> StopRequest:
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        _watched.add(self._write.fileno())
        self._previous_fd = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        self._previous = {
            number: signal.signal(number, self._remember) for number in (*self._stop, *_REQUEUE)
        }
        # Who started it with nohup has said what is to happen.
        if signal.SIGHUP not in self._stop or self._previous[signal.SIGHUP] == signal.SIG_IGN:
            self._previous.setdefault(signal.SIGHUP, signal.getsignal(signal.SIGHUP))
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        self._watcher = HelperThread(self._watch, name="signals", on_failure=self.helper_failed)
        self._watcher.start()
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        _watched.discard(self._write.fileno())
        self._write.setblocking(True)
        self._write.send(bytes([_STOP_WATCHING]))
        self._watcher.join()
        self._read.close()
        self._write.close()

    @property
    def reason(self) -> str | None:
        """Returns what asked this process to stop: a signal, a thread, the time limit, or None."""
        if self.signal_name is not None:
            return self.signal_name
        return self._failure or (TIME_LIMIT if self._time_is_up() else None)

    def helper_failed(self, why: str) -> None:
        """Asks to stop and go on later: a thread that the run needs has ended before its time."""
        self._failure = why
        print(f"error: {why}; the run stops and saves after this step", file=sys.stderr, flush=True)

    def read(self, device: torch.device) -> torch.Tensor:
        """Returns ``[2]``, for a sum over ranks: whether to stop, and to stop and go on later."""
        stop = self._number in self._stop
        later = self._number in _REQUEUE or self._failure is not None or self._time_is_up()
        requeue = not stop and later
        return numbers_on(device, float(stop), float(requeue))

    def _time_is_up(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is None:
            self._number = number
            self.signal_name = signal.Signals(number).name

    def _watch(self) -> None:
        """Ends the process on a second request. Signals arrive as bytes, whatever Python does."""
        asked_at: float | None = None
        while True:
            number = self._read.recv(1)[0]
            if number == _STOP_WATCHING:
                return
            if number not in (*self._stop, *_REQUEUE):
                continue
            now = time.monotonic()
            if asked_at is None:
                asked_at = now
            elif now - asked_at > _SAME_REQUEST_SECONDS:
                os._exit(128 + number)


def exit_code(requests: torch.Tensor) -> int | None:
    """Returns the exit code all ranks agree on, from the sum of :meth:`StopRequest.read`.

    It is None when the run goes on.

    Someone who wants the run to end wins over a time limit.
    """
    if requests[0] > 0:
        return INTERRUPTED_EXIT_CODE
    return RESUME_EXIT_CODE if requests[1] > 0 else None
