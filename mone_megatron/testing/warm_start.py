"""Starts Python processes that have imported torch and megatron-core already.

Importing them takes a process seconds of a core, more than the training of a tiny model, and the
tests start hundreds of processes. Here one process imports them (:mod:`.warm_imports`) and every
other is forked from it, by the fork server of :mod:`multiprocessing`, before it has a thread. It
differs from one started by the operating system in what it has imported, and in sharing the seed
of Python's string hashes with its siblings.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Protocol

from mone_megatron.helpers import starting

_IMPORTS = "mone_megatron.testing.warm_imports"
# Where it imports from: a package that is on the path later would not be found, nor its methods.
_PATH = os.environ.get("PYTHONPATH", "")


class Worker(Protocol):
    """Is what a process of :class:`subprocess.Popen` and a :class:`WarmProcess` have in common."""

    @property
    def pid(self) -> int:
        """Returns the process's number."""

    def poll(self) -> int | None:
        """Returns the exit code, negative for a signal; None while it runs."""

    def kill(self) -> None:
        """Sends SIGKILL, unless the process has ended."""

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the end and returns the exit code."""


def imports_as_usual(environment: Mapping[str, str]) -> bool:
    """Returns whether a process of this environment imports from where a warm one did."""
    return environment.get("PYTHONPATH", "") == _PATH


def warm_context() -> ForkServerContext:
    """Returns the multiprocessing context whose processes are warm.

    The fork server is started by the first of them, with the environment of that moment.
    """
    assert imports_as_usual(os.environ), "PYTHONPATH has changed: start a process of the system"
    return _context()


@functools.cache
def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_IMPORTS])
    return context


def forget_start_method() -> None:
    """Makes a warm process start its own processes as any other does.

    The fork server hands its way of starting them on to its children.
    """
    multiprocessing.set_start_method(None, force=True)


class WarmProcess:
    """Runs a module, script or code as ``python`` would, in a process that is warm.

    Attributes:
        pid: the process's number.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        environment: Mapping[str, str],
        folder: Path,
        stdout: Path | None = None,
        stderr: Path | None = None,
        new_session: bool = False,
    ) -> None:
        """Starts it.

        Args:
            arguments: those of ``python``: ``-m MODULE ...``, ``-c CODE ...`` or ``SCRIPT ...``.
            environment: all of its variables, with this process's ``PYTHONPATH``. Others that
                modules read when they are imported (``TRITON_INTERPRET``) do nothing any more.
            folder: where it works.
            stdout: file for what it says; None for this process's.
            stderr: file for what it says of errors, which may be the same; None likewise.
            new_session: whether it leads a session, and so a process group, of its own.

        Raises:
            HelperError: when it cannot be started.
        """
        assert imports_as_usual(environment), "another PYTHONPATH: start a process of the system"
        self._stderr = stderr
        files = [None if path is None else str(path) for path in (stdout, stderr)]
        for name in files:
            if name is not None:
                Path(name).write_bytes(b"")
        # Not a daemon: those may have no children.
        self._process = warm_context().Process(
            target=_run,
            args=(list(arguments), dict(environment), str(folder), files, new_session),
            daemon=False,
        )
        with starting(" ".join(arguments[:2])):
            self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        """Returns the exit code that is known; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Returns the exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    def said(self) -> str:
        """Returns what it has said of errors so far; its ``stderr`` is a file."""
        assert self._stderr is not None
        return self._stderr.read_text(encoding="utf-8", errors="replace")

    def send_signal(self, number: int) -> None:
        """Sends a signal, unless the process has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Sends SIGKILL, unless the process has ended."""
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the end and returns the exit code.

        Raises:
            subprocess.TimeoutExpired: when it has not ended after ``timeout`` seconds.
        """
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self._process), timeout or 0.0)
        return self._process.exitcode


def run_python(
    arguments: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    folder: Path,
    timeout: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs ``python *arguments`` to its end, in a process that is warm.

    Args:
        arguments: ``-m MODULE ...``, ``-c CODE ...`` or ``SCRIPT ...``.
        environment: variables beside those of this process.
        folder: where it works.
        timeout: seconds after which it is killed; None for any number.

    Returns:
        The exit code, and what it said.

    Raises:
        subprocess.TimeoutExpired: when it took longer.
    """
    with tempfile.TemporaryDirectory() as temporary:
        stdout, stderr = Path(temporary, "stdout"), Path(temporary, "stderr")
        process = WarmProcess(
            arguments,
            environment=os.environ | dict(environment or {}),
            folder=folder,
            stdout=stdout,
            stderr=stderr,
        )
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        said = [path.read_text(encoding="utf-8", errors="replace") for path in (stdout, stderr)]
        return subprocess.CompletedProcess(list(arguments), code, *said)


def _run(
    arguments: list[str],
    environment: dict[str, str],
    folder: str,
    files: list[str | None],
    new_session: bool,
) -> None:
    """Becomes what ``python *arguments`` is: what the forked process does."""
    forget_start_method()
    if new_session:
        os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    # Both are chosen once, from TMPDIR, and were in another process.
    tempfile.tempdir = None
    multiprocessing.current_process()._config.pop("tempdir", None)  # type: ignore[attr-defined]
    for number, name in enumerate(files, start=1):
        if name is not None:
            opened = os.open(name, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.dup2(opened, number)
            os.close(opened)
    if arguments[0] == "-m":
        sys.argv[:] = arguments[1:]
        sys.path.insert(0, folder)
        # As where nothing was imported: runpy warns of a module that is there twice.
        sys.modules.pop(arguments[1], None)
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.argv[:] = ["-c", *arguments[2:]]
        sys.path.insert(0, folder)
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv[:] = arguments
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")
