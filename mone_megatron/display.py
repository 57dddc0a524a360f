"""Lets standard output and error stop nothing: a log's reader may leave, or read ASCII only.

A reader that ends (``| head``, a killed ``tee``, a closed terminal) makes writing fail, a terminal
that knows no umlaut makes encoding fail. Neither is the work's failure: what cannot be shown is
dropped or spelt out, and :func:`lost` says so for the record.
"""

from __future__ import annotations

import functools
import os
import select
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, ParamSpec, TextIO

P = ParamSpec("P")

_STREAMS = {"stdout": "standard output", "stderr": "standard error"}


class _Shown:
    """Is a text stream whose writes do not fail; everything else is the stream's own."""

    def __init__(self, stream: TextIO, name: str, patience: float | None) -> None:
        self._stream = stream
        self._name = name
        self._patience = patience
        self._polled = _pollable(stream) if patience is not None else None
        self._stalled = False
        # What first kept something from being shown.
        self._why: str | None = None

    def write(self, text: str) -> int:
        try:
            if self._is_read():
                self._write(text)
        except (OSError, ValueError) as error:  # ValueError: it was closed
            self._note(error)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            if not self._stalled:
                self._stream.flush()
        except (OSError, ValueError) as error:
            self._note(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "ascii"
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))

    def _is_read(self) -> bool:
        """Returns whether there is room; a reader that stands still is waited for once."""
        if self._polled is None:
            return True
        patience = 0.0 if self._stalled else self._patience
        self._stalled = not select.select([], [self._polled], [], patience)[1]
        if self._stalled:
            self._note(TimeoutError(f"not read for {self._patience:g} s"))
        return not self._stalled

    def _note(self, error: Exception) -> None:
        if self._why is None:
            self._why = getattr(error, "strerror", None) or str(error)

    def _end(self) -> None:
        """Empties the buffers, so that the interpreter's own flush at its end cannot fail."""
        try:
            if not self._stalled:
                self._stream.flush()
                return
        except (OSError, ValueError):
            pass
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


def _pollable(stream: TextIO) -> int | None:
    """Returns the stream's descriptor if a reader at the other end may stand still, else None."""
    try:
        descriptor = stream.fileno()
        mode = os.fstat(descriptor).st_mode
    except (OSError, ValueError, AttributeError):
        return None
    return (
        descriptor if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or os.isatty(descriptor) else None
    )


@contextmanager
def harmless_output(*, patience: float | None = None) -> Iterator[None]:
    """Keeps standard output and error from making the block fail. It may be nested.

    Args:
        patience: seconds to wait for a reader that stands still (``less``, a stopped ``tee``);
            lines are dropped then until it reads again. None waits without end.
    """
    _occupy_standard_descriptors()
    before = {name: getattr(sys, name) for name in _STREAMS}
    ours: list[_Shown] = []
    for name, words in _STREAMS.items():
        stream = before[name]
        if isinstance(stream, _Shown):
            continue
        if stream is None:  # closed by whoever started this process
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        ours.append(shown := _Shown(stream, words, patience))
        setattr(sys, name, shown)
    try:
        yield
    finally:
        for shown in ours:
            shown._end()
        for name, stream in before.items():
            setattr(sys, name, stream)


def harmless(main: Callable[P, int]) -> Callable[P, int]:
    """Returns the command line ``main`` with :func:`harmless_output` around it."""

    @functools.wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> int:
        with harmless_output():
            return main(*args, **kwargs)

    return wrapped


def lost() -> dict[str, str]:
    """Returns why streams could not show something so far: ``{"standard error": ...}``."""
    streams = (getattr(sys, name) for name in _STREAMS)
    return {
        stream._name: stream._why
        for stream in streams
        if isinstance(stream, _Shown) and stream._why is not None
    }


def is_read(name: str) -> bool:
    """Returns whether ``stdout`` or ``stderr`` lost nothing, so that showing more has a point."""
    return _STREAMS[name] not in lost()


def _occupy_standard_descriptors() -> None:
    """Opens the standard descriptors that were closed.

    Otherwise the next file would take the number, and libraries' output with it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
